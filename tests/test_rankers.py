"""Ranking of variants and late fusion: one dot product of concatenated vectors, the best of K interests."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import minimize, nnls
from scipy.special import softmax

from rarec.evaluation import fusion as late_fusion
from rarec.evaluation.fusion import Fusion, Likelihood, ValidationLikelihood, fuse, maximise
from rarec.evaluation.rows import pairs_of_interest
from rarec.ranking.rank import EvalBatch, VectorScores, rank_scores
from rarec.ranking.rankers import CachedRanker, FusedRanker, NeighbourRanker, VectorRanker, rank_users

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
    assert (model.scored(batch).block(slice(1, 2)) == as_it_was_BN[1]).all()
    assert (first_BN == as_it_was_BN).all()


def shares(fusion: Fusion) -> dict[str, float]:
    return {name: fitted["share"] for name, fitted in fusion.parts.items()}


@pytest.mark.parametrize("interests", [1, 4])
def test_a_fused_score_is_the_sum_of_both(text, interests):
    ids = ranker(RNG.standard_normal((5, interests, 2)), RNG.standard_normal((7, 2)))
    batch = EvalBatch(np.arange(5), [np.array([], int)] * 5, np.zeros(5, int))
    fused = FusedRanker((text, ids, text), (1.0, 0.7, 2.0), (1.0, 0.0, 0.0))
    own_BN, others_BN = text.scores(batch), ids.scores(batch)
    assert np.allclose(fused.scores(batch), 3 * own_BN + 0.7 * others_BN, atol=1e-5)


def test_an_item_that_the_id_model_does_not_know_has_the_score_that_the_variant_lets_expect():
    """ID scores are 5 - 2 x the variant's, but item 3 has no vector: its score is the one on the same line."""
    variant_N, lacking_N = np.array([1.0, 4.0, 7.0, 9.0, -3.0]), np.arange(5) == 3
    id_N = 5 - 2 * variant_N
    variant = ranker(np.ones((6, 1)), variant_N[:, None])
    gapped = np.where(lacking_N, id_N[~lacking_N].mean(), id_N)
    ids = replace(ranker(np.ones((6, 1)), gapped[:, None]), lacking_N=lacking_N)
    batch = EvalBatch(
        np.arange(6), [np.array([], int)] * 6, np.full(6, 4)
    )  # the lowest of the variant's: weight counts
    fused = fuse({"variant": variant, "id": ids}, batch).ranker
    assert fused.weights[1] > 0
    assert np.allclose(fused.scores(batch), fused.weights[0] * variant_N + fused.weights[1] * id_N, atol=1e-5)


def test_the_first_part_that_lacks_nothing_predicts_what_another_lacks():
    """In any order: a part that lacks the item itself cannot predict it."""
    text_N, lacking_N = np.array([1.0, 4.0, 7.0, 9.0, -3.0]), np.arange(5) == 3
    line_N = 5 + 2 * text_N
    text = ranker(np.ones((6, 1)), text_N[:, None])
    gapped = replace(
        ranker(np.ones((6, 1)), np.where(lacking_N, line_N[~lacking_N].mean(), line_N)[:, None]), lacking_N=lacking_N
    )
    batch = EvalBatch(np.arange(6), [np.array([], int)] * 6, np.full(6, 2))
    fused = fuse({"gapped": gapped, "text": text}, batch)
    assert list(fused.parts) == ["text", "gapped"]
    assert shares(fused)["gapped"] > 0
    of_text, of_gapped = fused.ranker.weights
    assert np.allclose(fused.ranker.scores(batch), of_text * text_N + of_gapped * line_N, atol=1e-5)


def test_a_neighbour_table_predicts_from_what_it_lists_alone():
    """Of the two items that the ID model lacks, the listed one is above its mean score, the other is at it."""
    near = sparse.csr_matrix(np.array([[0, 0.16, 0, 0.64, 0]] * 5, np.float32))
    lacking_N = np.array([False, False, False, True, True])
    items = np.where(lacking_N, 3.0, [1.0, 6.0, 2.0, 0.0, 0.0])[:, None]
    ids = replace(ranker(np.ones((5, 1)), items), lacking_N=lacking_N)
    batch = EvalBatch(np.arange(5), [np.array([0])] * 5, np.array([1, 1, 3, 1, 3]))
    fused = fuse({"id": ids, "lexical": NeighbourRanker(near, 10, 0.7)}, batch)
    of_words, of_ids = fused.ranker.weights
    assert list(fused.parts) == ["lexical", "id"]
    assert fused.ranker.parts[0].lists
    slope = fused.ranker.slopes[1]
    assert slope > 0
    assert fused.ranker.scores(batch)[0, 3] == pytest.approx(of_words * 0.8 + of_ids * (3 + slope * 0.8), rel=1e-5)
    assert fused.ranker.scores(batch)[0, 4] == pytest.approx(of_ids * 3, rel=1e-5)


def test_a_fusion_does_not_depend_on_how_many_scores_are_held_at_a_time(monkeypatch):
    items = RNG.standard_normal((9, 3))
    rankers = {name: ranker(RNG.standard_normal((7, 3)), items) for name in ("a", "b")}
    rankers["c"] = replace(ranker(RNG.standard_normal((7, 3)), items), lacking_N=np.arange(9) > 6)
    batch = EvalBatch(np.arange(7), [np.array([at]) for at in range(7)], np.array([8, 7, 6, 5, 4, 3, 2]))
    whole = fuse(rankers, batch)
    monkeypatch.setattr(late_fusion, "_BLOCK", 2 * 9)
    assert fuse(rankers, batch).ranker.weights == pytest.approx(whole.ranker.weights, abs=1e-5)
    assert fuse(rankers, batch).ranker.slopes == pytest.approx(whole.ranker.slopes)


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
    fusion = fuse({"variant": ranker(*variant), "id": ranker(*ids)}, batch)
    own, others = fusion.ranker.weights
    assert others / own == pytest.approx(max(weights[1] / weights[0], 0), rel=0.1)
    assert (shares(fusion)["id"] == 0) == (weights[1] < 0)
    assert sum(shares(fusion).values()) == pytest.approx(1)


@pytest.mark.parametrize("interests", [1, 3])
def test_a_variant_that_tells_nothing_leaves_the_order_to_the_id_model(interests):
    flat = ranker(np.zeros((6, 2)), RNG.standard_normal((9, 2)))
    users = np.zeros((6, interests, 9))
    users[:, interests - 1] = np.eye(9)[:6]
    batch = EvalBatch(np.arange(6), [np.array([8])] * 6, np.arange(6))
    fusion = fuse({"flat": flat, "id": ranker(users, np.eye(9))}, batch)
    assert shares(fusion) == {"flat": 0, "id": 1}
    assert (fusion.ranker.ranks(batch) == 1).all()


def test_an_id_model_that_tells_nothing_changes_no_order():
    rng = np.random.default_rng(2)
    variant, flat = (rng.standard_normal((40, 3)), rng.standard_normal((9, 3))), (np.ones((40, 1)), np.ones((9, 1)))
    histories = [np.array([], int)] * 40
    batch = EvalBatch(np.arange(40), histories, drawn(rng, variant, flat, (1.0, 0.0), histories))
    fusion = fuse({"variant": ranker(*variant), "flat": ranker(*flat)}, batch)
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
    fused = fuse({"same": ranker(*same), "id": ranker(users, items)}, batch).ranker
    ranks = rank_users(batch, {"fused": fused, "ids": ranker(users, items)})
    assert (ranks["fused"] == ranks["ids"]).mean() > 0.99


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e4])
def test_the_scale_of_the_id_vectors_changes_no_fusion(scale):
    rng, users = np.random.default_rng(5), 2000
    variant, ids = ((rng.standard_normal((users, 4)), rng.standard_normal((30, 4))) for _ in range(2))
    histories = [np.array([], int)] * users
    batch = EvalBatch(np.arange(users), histories, drawn(rng, variant, ids, (1.0, 1.0), histories))
    parts = [{"variant": ranker(*variant), "id": ranker(ids[0], ids[1] * each)} for each in (1.0, scale)]
    weights = [shares(fuse(each, batch))["id"] for each in parts]
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
    weights = fuse({"popularity": popularity, "id": model}, batch).ranker.weights
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
    lacking_N = np.arange(items) < 3
    parts = {
        "variant": ranker(rng.standard_normal((users, 4)), rng.standard_normal((items, 4))),
        "id": replace(ranker(rng.standard_normal((users, 3)), rng.standard_normal((items, 3))), lacking_N=lacking_N),
        "near": NeighbourRanker(sparse.random(items, items, 0.3, "csr", np.float32, rng), 4, 0.7),
    }
    histories = [rng.integers(0, items, 5) for _ in range(users)]
    batch = EvalBatch(np.arange(users), histories, np.zeros(users, int))
    whole = fuse(parts, batch).ranker  # its weights say nothing yet, but its parts and slopes do
    scores_PUN = [part.numpy().astype(float) for part in whole.scored(batch).parts(slice(0, users))]
    scores_PUN = np.stack([part / part.std(1).mean() for part in scores_PUN])
    seen_UN = np.zeros((users, items), bool)
    for user, history in enumerate(histories):
        seen_UN[user, history] = True
    drawn_UN = np.tensordot([0.8, 0.5, 0.6], scores_PUN, 1) + rng.gumbel(size=(users, items))
    targets = np.where(seen_UN, -np.inf, drawn_UN).argmax(1)

    def loss(weights):
        logits_UN = np.where(seen_UN, -np.inf, np.tensordot(weights, scores_PUN, 1))
        return -np.log(softmax(logits_UN, 1)[np.arange(users), targets]).mean()

    fused = fuse(parts, replace(batch, targets=targets)).ranker
    sizes = [part.numpy().std(1).mean() for part in fused.scored(batch).parts(slice(0, users))]
    best = minimize(loss, np.ones(3), bounds=[(0, None)] * 3, method="L-BFGS-B").x
    own = np.array(fused.weights) * sizes
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
    standard = FusedRanker(tuple(parts.values()), (1.0, 0.5, 12.0), (0.0,) * 3)
    scores_UN = standard.scores(batch) + rng.gumbel(size=(users, items))
    for user, history in enumerate(batch.histories):
        scores_UN[user, history] = -np.inf
    return parts, replace(batch, targets=scores_UN.argmax(1)), standard


@pytest.mark.parametrize("seed", range(3))
def test_candidates_that_are_all_items_have_the_likelihood_of_all_items(seed, monkeypatch):
    """Whether an item is among the best of no part, of one, or of several, it counts once."""
    _, batch, ranker = real_parts(np.random.default_rng(seed), 9, 40, 1.0)
    weights = np.array([0.3, 1.2, 0.7])
    whole = ValidationLikelihood(ranker, batch)(weights)
    for name, size in {"WHOLE": 39, "BEST": 7, "DRAWN": 40}.items():
        monkeypatch.setattr(late_fusion, name, size)
    of_candidates = ValidationLikelihood(ranker, batch)(weights)
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
    weights = maximise(ValidationLikelihood(FusedRanker(same, (300.0,) * 4, (0.0,) * 4), batch), np.ones(4))
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()


def test_the_part_that_can_never_lack_an_item_predicts_even_if_none_is_lacked_yet():
    """Items may be added to a bundle later: of these its words say something, its counts nothing."""
    table_NN = sparse.random(9, 9, 0.5, "csr", np.float32, np.random.default_rng(0))
    words, counted = (NeighbourRanker(table_NN, 4, 0.7, lacking_N) for lacking_N in (None, np.zeros(9, bool)))
    batch = EvalBatch(np.arange(3), [np.array([at]) for at in range(3)], np.array([6, 7, 8]))
    assert fuse({"counted": counted, "words": words}, batch).ranker.parts == (words, counted)


def test_of_a_large_catalogue_and_many_users_some_chunks_of_users_are_kept(monkeypatch):
    _, batch, ranker = real_parts(np.random.default_rng(0), 40, 3_000, 1.0)
    chunked = replace(batch, kept=tuple(batch.chunks(8)))
    monkeypatch.setattr(late_fusion, "WHOLE", 2_999)
    weights = ValidationLikelihood(ranker, chunked)(np.ones(3))
    some = [chunked.kept[0], chunked.kept[3]]
    expected = [ValidationLikelihood(ranker, one)(np.ones(3)).slope for one in some]
    assert weights.slope == pytest.approx(np.mean(expected, 0), abs=1e-5)


def test_in_a_large_catalogue_candidates_lead_to_about_the_weights_of_all_items(monkeypatch):
    parts, batch, _ = real_parts(np.random.default_rng(0), 400, 20_000, 1.5)
    whole = shares(fuse(parts, batch))
    monkeypatch.setattr(late_fusion, "WHOLE", 19_999)
    assert shares(fuse(parts, batch)) == pytest.approx(whole, abs=0.02)
    assert min(whole.values()) > 0.1
