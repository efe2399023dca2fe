"""Ranking of variants and late fusion: one dot product of concatenated vectors, the best of K interests."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import minimize, nnls
from scipy.special import softmax

from rarec.evaluation import fusion as late_fusion
from rarec.evaluation.fusion import Fusion, Likelihood, ValidationLikelihood, fuse, maximise, pretended
from rarec.evaluation.rows import pairs_of_interest
from rarec.ranking.learned import best_of
from rarec.ranking.rank import EvalBatch, VectorScores, rank_scores
from rarec.ranking.rankers import (
    CachedRanker,
    FusedRanker,
    NeighbourRanker,
    Ranker,
    UnmetRanker,
    VectorRanker,
    new_items,
    rank_users,
)

RNG = np.random.default_rng(0)


def ranker(users: np.ndarray, items: np.ndarray) -> VectorRanker:
    """A ranker of fixed vectors that reads no history."""
    return VectorRanker(items.astype(np.float32), lambda rows, histories: users[rows].astype(np.float32))


@pytest.fixture
def text() -> VectorRanker:
    return ranker(RNG.standard_normal((5, 3)), RNG.standard_normal((7, 3)))


@pytest.mark.parametrize("users_at_a_time", [1, 3, 99])
def test_ranks_do_not_depend_on_the_chunks_and_a_cached_ranker_encodes_each_chunk_once(users_at_a_time):
    users, items = RNG.standard_normal((7, 2, 3)), RNG.standard_normal((9, 3))
    batch = EvalBatch(np.arange(7), [np.array([user, 8]) for user in range(7)], RNG.integers(9, size=7))
    encoded: list[int] = []

    def encode(rows, histories):
        encoded.extend(rows.tolist())
        return users[rows].astype(np.float32)

    model = CachedRanker(VectorRanker(items.astype(np.float32), encode))
    ranks = rank_users(batch, {"a": model, "b": model}, users_at_a_time=users_at_a_time)
    assert encoded == list(range(7))
    kept = batch.keeping_chunks()
    for _ in range(2):
        assert model.ranks(kept).tolist() == ranks["a"].tolist()
    assert encoded == 2 * list(range(7))
    expected = rank_scores(VectorScores(users, items), batch.targets, batch.histories)
    assert ranks["a"].tolist() == ranks["b"].tolist() == expected.tolist()
    nobody = EvalBatch(np.empty(0, int), [], np.empty(0, int))
    assert model.ranks(nobody).shape == (0,)


def test_what_a_cached_ranker_keeps_holds_no_block(text):
    """A large block must not stay as long as its chunk; so what one reader has of it is not overwritten by the next."""
    batch, model = EvalBatch(np.arange(5), [np.array([], int)] * 5, np.zeros(5, int)), CachedRanker(text)
    first_BN = model.scored(batch).block(slice(0, 5))
    as_it_was_BN = first_BN.clone()
    np.testing.assert_allclose(model.scored(batch).block(slice(1, 2))[0], as_it_was_BN[1], rtol=1e-5)
    assert (first_BN == as_it_was_BN).all()


def fused(parts: dict[str, Ranker], batch: EvalBatch) -> Fusion:
    """Fuse parts that know all items, with none left out to fit weights of new ones."""
    n_items = next(iter(parts.values())).scored(batch).n_items
    return fuse(parts, batch, np.ones(n_items, int))


def shares(fusion: Fusion) -> dict[str, float]:
    return {name: fitted["share"] for name, fitted in list(fusion.parts.items())[:-1]}


def every_term(ranker: FusedRanker) -> list[tuple[int, np.ndarray]]:
    """The parts of a fusion, standardised by its weights."""
    return [(part, np.full(len(ranker.new_N), weight)) for part, weight in enumerate(ranker.weights)]


@pytest.mark.parametrize("interests", [1, 4])
def test_a_fused_score_is_the_sum_of_both(text, interests):
    ids = ranker(RNG.standard_normal((5, interests, 2)), RNG.standard_normal((7, 2)))
    batch = EvalBatch(np.arange(5), [np.array([], int)] * 5, np.zeros(5, int))
    fused = FusedRanker((text, ids, text), (1.0, 0.7, 2.0), (0.0, 0.0, 0.0), np.zeros(7, bool))
    own_BN, others_BN = text.scores(batch), ids.scores(batch)
    assert np.allclose(fused.scores(batch), 3 * own_BN + 0.7 * others_BN, atol=1e-5)


def test_new_items_have_weights_of_their_own_that_the_targets_follow():
    """Known items are taken by ID scores, new ones by text scores three times as large, and all new ones more often."""
    rng, users, items = np.random.default_rng(0), 4000, 30
    new_N = np.arange(items) % 3 == 0
    text_UN, id_UN = rng.standard_normal((2, users, items))
    scores_UN = np.where(new_N, 0.9 * text_UN + 0.7, 0.3 * text_UN + 1.0 * id_UN)
    batch = EvalBatch(
        np.arange(users), [np.array([], int)] * users, (scores_UN + rng.gumbel(size=scores_UN.shape)).argmax(1)
    )
    text, ids = ranker(text_UN, np.eye(items)), ranker(id_UN, np.eye(items))
    text, ids = replace(text, encode_unmet=pytest.fail), replace(ids, knows_new=False)  # none is pretended to be new
    fusion = fuse({"text": text, "id": ids}, batch, np.where(new_N, 0, 9))
    of_text, of_ids, _ = fusion.ranker.weights
    new_text, new_ids, constant = fusion.ranker.new_weights
    assert np.array([of_text, new_text, constant]) / of_ids == pytest.approx([0.3, 0.9, 0.7], abs=0.07)
    assert new_ids == 0
    scores_BN = fusion.ranker.scores(batch)
    expected = np.where(new_N, new_text * text_UN + constant, of_text * text_UN + of_ids * id_UN)
    assert scores_BN == pytest.approx(expected, abs=1e-5)


def test_where_no_new_item_is_taken_every_tenth_counts_as_new():
    """Of a model that knows new items, it is the vector without what it learned of them, which tells nothing here.

    The last item is new and taken by nobody: it stands for no other.
    """
    rng, users, items = np.random.default_rng(0), 6000, 41
    counts_N = np.arange(items - 1, -1, -1)
    every_tenth = [5, 15, 25, 35]
    assert pretended(counts_N).tolist() == every_tenth
    scores_UN = rng.standard_normal((users, items))
    targets = (scores_UN + rng.gumbel(size=scores_UN.shape))[:, :-1].argmax(1)
    batch = EvalBatch(np.arange(users), [np.array([], int)] * users, targets)
    asked = []

    def without(rows):
        asked.append(rows.tolist())
        return np.zeros((len(rows), items), np.float32)

    variant = CachedRanker(replace(ranker(scores_UN, np.eye(items)), encode_unmet=without))
    fusion, again = (fuse({"variant": variant}, batch, counts_N) for _ in range(2))
    assert asked == [every_tenth], "they are encoded once"
    assert fusion.parts == again.parts
    weight, constant = fusion.ranker.weights[0], fusion.ranker.new_weights[1]
    assert (weight, constant) == pytest.approx((1, 0.5), abs=0.12), "the mean of exp of a normal score"
    scores_BN = fusion.ranker.scores(batch)
    assert scores_BN[:, :-1] == pytest.approx(weight * scores_UN[:, :-1], abs=1e-5), "they are known where users rank"
    taught, known = fusion.ranker.taught
    assert np.flatnonzero(taught.new_N).tolist() == [*every_tenth, 40]
    assert taught.scores(batch)[:, every_tenth] == pytest.approx(constant)
    for each in (taught, known):
        assert not (best_of(each.scored(batch), batch, slice(0, users))[0].rows_BK == 40).any()
    assert np.array_equal(known.scores(batch), scores_BN), "orders are also learned where they are known"


def test_an_item_without_an_id_vector_is_new_whatever_the_interactions():
    lacking = replace(ranker(np.ones((2, 1)), np.ones((4, 1))), lacking_N=np.array([True, False, True, False]))
    assert new_items(np.array([3, 0, 0, 5]), [lacking, lacking]).tolist() == [True, True, True, False]
    assert new_items(np.array([3, 0]), [VectorRanker.of_counts(np.array([3, 0]))]).tolist() == [False, True]


@pytest.mark.parametrize("several", [1, 3])
def test_a_model_that_has_not_met_some_items_has_the_scores_of_their_other_vectors(several):
    rng = np.random.default_rng(0)
    users, items, others = rng.normal(size=(6, several, 4)), rng.normal(size=(9, 4)), rng.normal(size=(2, 4))
    batch = EvalBatch(np.arange(6), [np.array([], int)] * 6, np.zeros(6, int))
    rows, changed = np.array([7, 2]), items.copy()
    changed[rows] = others
    unmet = UnmetRanker(CachedRanker(ranker(users, items)), rows, others.astype(np.float32))
    assert unmet.scores(batch) == pytest.approx(ranker(users, changed).scores(batch), abs=1e-5)


def test_a_fusion_does_not_depend_on_how_many_scores_are_held_at_a_time(monkeypatch):
    items = RNG.standard_normal((9, 3))
    rankers = {name: ranker(RNG.standard_normal((7, 3)), items) for name in ("a", "b")}
    rankers["c"] = replace(ranker(RNG.standard_normal((7, 3)), items), knows_new=False)
    batch = EvalBatch(np.arange(7), [np.array([at]) for at in range(7)], np.array([8, 7, 6, 5, 4, 3, 2]))
    counts_N = np.arange(9) % 4  # two are new
    whole = fuse(rankers, batch, counts_N)
    monkeypatch.setattr(late_fusion, "_BLOCK", 2 * 9)
    again = fuse(rankers, batch, counts_N)
    assert again.ranker.weights == pytest.approx(whole.ranker.weights, abs=1e-5)
    assert again.ranker.new_weights == pytest.approx(whole.ranker.new_weights, abs=1e-4)


def drawn(rng, variant, ids, weights, histories):
    """For each user, a target drawn from the softmax of the weighted sum of both scores, over unseen items."""
    scores_UN = weights[0] * variant[0] @ variant[1].T + weights[1] * ids[0] @ ids[1].T
    for user, history in enumerate(histories):
        scores_UN[user, history] = -np.inf
    gumbel_UN = scores_UN + rng.gumbel(size=scores_UN.shape)
    return gumbel_UN.argmax(1)


@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.5, 1.0), (1.0, -0.5)])
def test_the_weight_is_the_one_that_makes_the_validation_targets_likeliest(weights):
    """Targets are drawn by known weights. What was seen counts for nothing; below zero no weight goes."""
    rng, users = np.random.default_rng(1), 5000
    variant, ids = ((rng.standard_normal((users, 4)), rng.standard_normal((30, 4))) for _ in range(2))
    variant[1][7] = ids[1][7] = 50.0  # would drown all others, but everyone has seen it
    histories = [np.array([7, 7])] * users
    batch = EvalBatch(np.arange(users), histories, drawn(rng, variant, ids, weights, histories))
    fusion = fused({"variant": ranker(*variant), "id": ranker(*ids)}, batch)
    own, others, _ = fusion.ranker.weights
    assert others / own == pytest.approx(max(weights[1] / weights[0], 0), rel=0.1)
    assert (shares(fusion)["id"] == 0) == (weights[1] < 0)
    assert sum(shares(fusion).values()) == pytest.approx(1)


@pytest.mark.parametrize("interests", [1, 3])
def test_a_variant_that_tells_nothing_leaves_the_order_to_the_id_model(interests):
    flat = ranker(np.zeros((6, 2)), RNG.standard_normal((9, 2)))
    users = np.zeros((6, interests, 9))
    users[:, interests - 1] = np.eye(9)[:6]
    batch = EvalBatch(np.arange(6), [np.array([8])] * 6, np.arange(6))
    fusion = fused({"flat": flat, "id": ranker(users, np.eye(9))}, batch)
    assert shares(fusion) == {"flat": 0, "id": 1}
    assert (fusion.ranker.ranks(batch) == 1).all()


def test_an_id_model_that_tells_nothing_changes_no_order():
    rng = np.random.default_rng(2)
    variant, flat = (rng.standard_normal((40, 3)), rng.standard_normal((9, 3))), (np.ones((40, 1)), np.ones((9, 1)))
    histories = [np.array([], int)] * 40
    batch = EvalBatch(np.arange(40), histories, drawn(rng, variant, flat, (1.0, 0.0), histories))
    fusion = fused({"variant": ranker(*variant), "flat": ranker(*flat)}, batch)
    ranks = rank_users(batch, {"fused": fusion.ranker, "variant": ranker(*variant)})
    assert shares(fusion)["flat"] == pytest.approx(0, abs=1e-3)
    assert (ranks["fused"] == ranks["variant"]).all()


@pytest.mark.parametrize("constant", [1.0, 20.0])
def test_a_variant_whose_scores_differ_by_rounding_alone_tells_nothing(constant):
    rng = np.random.default_rng(4)
    users, items = rng.standard_normal((300, 8)), rng.standard_normal((60, 8))
    same = constant * rng.dirichlet(np.ones(64), 300), np.ones((60, 64)) + 1e-7 * rng.standard_normal((60, 64))
    histories = [np.array([], int)] * 300
    batch = EvalBatch(np.arange(300), histories, drawn(rng, (users, items), (users, items), (1.0, 0.0), histories))
    whole = fused({"same": ranker(*same), "id": ranker(users, items)}, batch).ranker
    ranks = rank_users(batch, {"fused": whole, "ids": ranker(users, items)})
    assert (ranks["fused"] == ranks["ids"]).mean() > 0.99


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e4])
def test_the_scale_of_the_id_vectors_changes_no_fusion(scale):
    rng, users = np.random.default_rng(5), 2000
    variant, ids = ((rng.standard_normal((users, 4)), rng.standard_normal((30, 4))) for _ in range(2))
    histories = [np.array([], int)] * users
    batch = EvalBatch(np.arange(users), histories, drawn(rng, variant, ids, (1.0, 1.0), histories))
    parts = [{"variant": ranker(*variant), "id": ranker(ids[0], ids[1] * each)} for each in (1.0, scale)]
    weights = [shares(fused(each, batch))["id"] for each in parts]
    assert weights[1] == pytest.approx(weights[0], rel=1e-3)


def test_popularity_ranks_what_was_met_most_often_first():
    batch = EvalBatch(np.arange(2), [np.array([1]), np.array([3])], np.array([3, 1]))
    popularity = VectorRanker.of_counts(np.array([0, 7, 2, 5]))
    assert popularity.top_k(batch, 3).tolist() == [[3, 2, 0], [1, 2, 0]]
    assert popularity.scores(batch) == pytest.approx(np.log([[1, 8, 3, 6]] * 2))


@pytest.mark.parametrize("interests", [1, 3])
def test_an_id_model_that_knows_no_popularity_gains_by_as_much_as_the_targets_follow_it(interests):
    """Targets are drawn by half the ID score and twice the log of popularity."""
    rng, users = np.random.default_rng(3), 5000
    counts_N = rng.integers(0, 50, 30)
    ids = rng.standard_normal((users, interests, 4)), rng.standard_normal((30, 4))
    scores_UN = 0.5 * (ids[0] @ ids[1].T).max(1) + 2 * np.log1p(counts_N)
    targets = (scores_UN + rng.gumbel(size=scores_UN.shape)).argmax(1)
    batch = EvalBatch(np.arange(users), [np.array([], int)] * users, targets)
    popularity, model = VectorRanker.of_counts(counts_N), ranker(*ids)
    weights = fuse({"popularity": popularity, "id": model}, batch, counts_N + 1).ranker.weights
    assert weights[1] / weights[0] == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("main", ["text_only", "input", "per_layer"])
def test_no_variant_is_compared_with_itself_or_twice_with_another(main):
    variants = [
        "id_only",
        *(name + part for name in ("text_only", "prefix_only", "input", "per_layer") for part in ("", "+id")),
        *(f"{name}+cheap" for name in ("id_only", "text_only+id", f"{main}+id")),
    ]
    pairs = pairs_of_interest(variants, main)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert all(variant != other for variant, other in pairs)
    assert {(main, "id_only"), (f"{main}+id", "id_only"), (f"{main}+id", main)} <= set(pairs)
    assert ("text_only+id", "id_only") in pairs
    either = {frozenset((name, "text_only+id")) for name in ("input+id", "per_layer+id")}
    assert either | {frozenset(("prefix_only", "text_only"))} <= set(map(frozenset, pairs))


def test_any_variant_that_may_be_the_best_is_compared_with_the_id_model_and_with_text_and_id():
    names = ["text_only", "text_only+id", "input", "input+id", "per_layer", "per_layer+id"]
    popular = ["id_only+cheap", "text_only+id+cheap", "per_layer+id+cheap"]
    pairs = pairs_of_interest(["id_only", *names, *popular, "per_layer/permuted_ids"], "per_layer")
    assert {(name, "id_only") for name in names} <= set(pairs)
    assert {frozenset((name, "text_only+id")) for name in names if name != "text_only+id"} <= set(map(frozenset, pairs))
    assert ("per_layer+id+cheap", "id_only+cheap") in pairs
    assert ("text_only+id+cheap", "id_only+cheap") in pairs
    assert ("per_layer+id+cheap", "text_only+id+cheap") in pairs
    assert ("per_layer/permuted_ids", "id_only") not in pairs


@pytest.mark.parametrize("seed", range(4))
def test_the_weights_of_many_parts_are_the_optimum_that_scipy_finds(seed):
    """Of a logistic model of choices; where weights below zero would fit better, the bound holds."""
    rng, users, parts = np.random.default_rng(seed), 800, 6
    scores_PUN = rng.standard_normal((parts, users, 12))
    wanted = rng.normal(0.3, 0.7, parts)
    targets = (np.tensordot(wanted, scores_PUN, 1) + rng.gumbel(size=(users, 12))).argmax(1)

    def likelihood(weights):
        logits_UN = np.tensordot(weights, scores_PUN, 1)
        chance_UN = softmax(logits_UN, 1)
        mean_PU = (scores_PUN * chance_UN).sum(2)
        value = np.log(chance_UN[np.arange(users), targets]).mean()
        slope = (scores_PUN[:, np.arange(users), targets] - mean_PU).mean(1)
        apart = scores_PUN - mean_PU[:, :, None]
        return Likelihood(value, slope, np.einsum("pun,qun,un->pq", apart, apart, chance_UN) / users)

    weights = maximise(likelihood, np.ones(parts))
    best = minimize(
        lambda weights: -likelihood(weights).value,
        np.ones(parts),
        jac=lambda weights: -likelihood(weights).slope,
        bounds=[(0, None)] * parts,
        method="L-BFGS-B",
    )
    assert weights == pytest.approx(best.x, abs=2e-3)
    assert (weights >= 0).all()
    assert (wanted < -0.3).any() == (weights == 0).any()


@pytest.mark.parametrize("seed", range(3))
def test_a_fusion_of_real_parts_is_the_optimum_that_scipy_finds(seed):
    """Dense parts, a neighbour table and gaps; seen items do not compete. Scipy has no derivative."""
    rng, users, items = np.random.default_rng(seed), 150, 20
    parts = {
        "variant": ranker(rng.standard_normal((users, 4)), rng.standard_normal((items, 4))),
        "id": ranker(rng.standard_normal((users, 3)), rng.standard_normal((items, 3))),
        "near": NeighbourRanker(sparse.random(items, items, 0.3, "csr", np.float32, rng), 4, 0.7),
    }
    histories = [rng.integers(0, items, 5) for _ in range(users)]
    batch = EvalBatch(np.arange(users), histories, np.zeros(users, int))
    scores_PUN = [part.scores(batch).astype(float) for part in parts.values()]
    scores_PUN = np.stack([part / part.std(1).mean() for part in scores_PUN])
    seen_UN = np.zeros((users, items), bool)
    for user, history in enumerate(histories):
        seen_UN[user, history] = True
    drawn_UN = np.tensordot([0.8, 0.5, 0.6], scores_PUN, 1) + rng.gumbel(size=(users, items))
    targets = np.where(seen_UN, -np.inf, drawn_UN).argmax(1)

    def loss(weights):
        logits_UN = np.where(seen_UN, -np.inf, np.tensordot(weights, scores_PUN, 1))
        return -np.log(softmax(logits_UN, 1)[np.arange(users), targets]).mean()

    sizes = [part.scores(batch).std(1).mean() for part in parts.values()]
    whole = FusedRanker(tuple(parts.values()), tuple(1 / np.array(sizes)), (0.0,) * 3, np.zeros(items, bool))
    own = maximise(ValidationLikelihood(whole, replace(batch, targets=targets), every_term(whole)), np.ones(3))
    best = minimize(loss, np.ones(3), bounds=[(0, None)] * 3, method="L-BFGS-B").x
    assert own / own.sum() == pytest.approx(best / best.sum(), abs=5e-3)


def test_weights_that_a_step_would_take_below_zero_do_not_stop_the_others():
    """A quadratic with correlated parts: steps that are cut off at zero one by one end far from the optimum."""
    rng = np.random.default_rng(2274)
    apart_QP = rng.standard_normal((8, 6)) + 2.5 * rng.standard_normal((8, 1))
    best = 1.5 * rng.standard_normal(6)
    curve = apart_QP.T @ apart_QP / 6

    def likelihood(weights):
        return Likelihood(-(weights - best) @ curve @ (weights - best) / 2, -curve @ (weights - best), curve)

    assert maximise(likelihood, np.ones(6)) == pytest.approx(nnls(apart_QP, apart_QP @ best)[0], abs=1e-6)


def real_parts(rng, users: int, items: int, spread: float):
    """Three kinds of parts, two of which name some of the same items as their best, and users with known weights."""
    parts = {
        "variant": ranker(rng.standard_normal((users, 4)), spread * rng.standard_normal((items, 4))),
        "popularity": VectorRanker.of_counts(rng.zipf(1.5, items).clip(max=10_000)),
        "near": NeighbourRanker(sparse.random(items, items, min(1.0, 40 / items), "csr", np.float32, rng), 4, 0.7),
    }
    batch = EvalBatch(np.arange(users), [rng.integers(0, items, 5) for _ in range(users)], np.zeros(users, int))
    standard = FusedRanker(tuple(parts.values()), (1.0, 0.5, 12.0), (0.0,) * 3, np.zeros(items, bool))
    scores_UN = standard.scores(batch) + rng.gumbel(size=(users, items))
    for user, history in enumerate(batch.histories):
        scores_UN[user, history] = -np.inf
    return parts, replace(batch, targets=scores_UN.argmax(1)), standard


@pytest.mark.parametrize("seed", range(3))
def test_candidates_that_are_all_items_have_the_likelihood_of_all_items(seed, monkeypatch):
    """Whether an item is among the best of no part, of one, or of several, it counts once."""
    _, batch, ranker = real_parts(np.random.default_rng(seed), 9, 40, 1.0)
    weights = np.array([0.3, 1.2, 0.7])
    whole = ValidationLikelihood(ranker, batch, every_term(ranker))(weights)
    for name, size in {"WHOLE": 39, "BEST": 7, "DRAWN": 40}.items():
        monkeypatch.setattr(late_fusion, name, size)
    of_candidates = ValidationLikelihood(ranker, batch, every_term(ranker))(weights)
    assert of_candidates.slope == pytest.approx(whole.slope, abs=1e-5)
    assert of_candidates.curve == pytest.approx(whole.curve, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_parts_that_are_nearly_the_same_have_weights(seed):
    """Rounding makes their curvature singular."""
    rng = np.random.default_rng(seed)
    _, batch, ranker = real_parts(rng, 20, 3_000, 1.0)
    near = ranker.parts[2]
    tables = [near.table_NN.multiply(1 + 1e-5 * scale).tocsr() for scale in range(4)]
    same = tuple(replace(near, table_NN=table) for table in tables)
    close = FusedRanker(same, (300.0,) * 4, (0.0,) * 4, np.zeros(3_000, bool))
    weights = maximise(ValidationLikelihood(close, batch, every_term(close)), np.ones(4))
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()


def test_of_a_large_catalogue_and_many_users_some_chunks_of_users_are_kept(monkeypatch):
    _, batch, ranker = real_parts(np.random.default_rng(0), 40, 3_000, 1.0)
    chunked = replace(batch, kept=tuple(batch.chunks(8)))
    monkeypatch.setattr(late_fusion, "WHOLE", 2_999)
    weights = ValidationLikelihood(ranker, chunked, every_term(ranker))(np.ones(3))
    some = [chunked.kept[0], chunked.kept[3]]
    expected = [ValidationLikelihood(ranker, one, every_term(ranker))(np.ones(3)).slope for one in some]
    assert weights.slope == pytest.approx(np.mean(expected, 0), abs=1e-5)


def test_in_a_large_catalogue_of_low_scores_the_candidates_of_a_term_are_items_that_it_concerns(monkeypatch):
    """New items, which the ID scores do not concern, are no better than items of negative scores."""
    rng, users, items = np.random.default_rng(0), 800, 300
    new_N = np.arange(items) % 10 == 0
    text_UN, id_UN = 2 * rng.standard_normal((2, users, items)) - 30
    scores_UN = np.where(new_N, text_UN, id_UN) + rng.gumbel(size=(users, items))
    batch = EvalBatch(np.arange(users), [np.array([], int)] * users, scores_UN.argmax(1))
    parts = {"text": ranker(text_UN, np.eye(items)), "id": replace(ranker(id_UN, np.eye(items)), knows_new=False)}
    whole = fuse(parts, batch, np.where(new_N, 0, 9)).ranker
    for name, size in {"WHOLE": items - 1, "BEST": 10, "DRAWN": 20}.items():
        monkeypatch.setattr(late_fusion, name, size)
    few = fuse(parts, batch, np.where(new_N, 0, 9)).ranker
    own = few.weights[1], few.new_weights[0]
    assert own == pytest.approx((whole.weights[1], whole.new_weights[0]), rel=0.1)


def test_in_a_large_catalogue_candidates_lead_to_about_the_weights_of_all_items(monkeypatch):
    parts, batch, _ = real_parts(np.random.default_rng(0), 400, 20_000, 1.5)
    whole = shares(fused(parts, batch))
    monkeypatch.setattr(late_fusion, "WHOLE", 19_999)
    assert shares(fused(parts, batch)) == pytest.approx(whole, abs=0.02)
    assert min(whole.values()) > 0.1
