"""The learned order: features and scores by hand, what it learns, that no other item passes a candidate, its row."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import rarec
from rarec.bundle.bundle import ORDER
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.evaluation import evaluator
from rarec.evaluation.learned import examples_of, learn
from rarec.evaluation.results import cheap_suffix, variant_group, variant_title
from rarec.evaluation.rows import pairs_of_interest
from rarec.export import write_targets
from rarec.export.onnx_recommender import OnnxRecommender
from rarec.export.rarec_client import Client
from rarec.ranking.learned import LearnedRanker, best_of
from rarec.ranking.order import Candidates, LearnedOrder, reordered
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import CachedRanker, FusedRanker, VectorRanker, rank_users
from rarec.stages.run import Run
from rarec.storage.files import read_json
from tests.recommending import histories, sealed, with_items

ROW = "per_layer+id+cheap+learned"
ITEMS = 300


def table(scores_UN) -> VectorRanker:
    """Return a part with these scores, by user row."""
    scores_UN = np.asarray(scores_UN, np.float32)
    return VectorRanker(np.eye(scores_UN.shape[1], dtype=np.float32), lambda rows, histories: scores_UN[rows])


def fusion(*parts, weights=None) -> FusedRanker:
    return FusedRanker(
        tuple(map(table, parts)),
        weights or (1.0,) * len(parts),
        (0.0,) * len(parts),
        np.zeros(np.shape(parts[0])[1], bool),
    )


def users(targets, histories=None) -> EvalBatch:
    count = len(targets)
    return EvalBatch(np.arange(count), histories or [np.array([0])] * count, np.array(targets))


def plain(features: int, factor: float = 1.0) -> LearnedOrder:
    """Return the order that the fusion has."""
    return LearnedOrder(np.zeros((features, 1), np.float32), np.zeros(1, np.float32), np.zeros(1, np.float32), factor)


def test_features_by_hand():
    """Two parts, three candidates; a history of 4 items, 2 of them different."""
    shares = np.array([[[3, 1], [2, 2], [0, 3]]], np.float32)
    features = Candidates(np.array([[5, 6, 7]]), shares, np.array([[4, 2]])).features_BKF[0]
    log = np.log1p
    assert features == pytest.approx(
        np.array(
            [
                [3, 1, 0, -2, log(0), log(2), 0, log(0), np.log(4), 0.5],
                [2, 2, -1, -1, log(1), log(1), 0, log(1), np.log(4), 0.5],
                [0, 3, -3, 0, log(2), log(0), -1, log(2), np.log(4), 0.5],
            ]
        )
    )


def test_scores_are_the_networks_and_the_fusions():
    candidates = Candidates(np.array([[5, 6]]), np.array([[[2.0], [1.0]]], np.float32), np.array([[1, 1]]))
    first_FH = np.zeros((7, 2), np.float32)
    first_FH[0] = 1, -1  # the share, and its negative, which the rectifier makes 0
    order = LearnedOrder(first_FH, np.array([0, 1.5], np.float32), np.array([10, 100], np.float32), 3.0)
    assert order.scores(candidates).tolist() == [[10 * 2 + 100 * 0 + 3 * 2, 10 * 1 + 100 * 0.5 + 3 * 1]]


def test_candidates_are_the_best_unseen_items_and_the_target_competes():
    scores = np.arange(ITEMS, 0, -1.0)[None].repeat(2, 0)
    batch = users([250, 1], [np.array([0, 2]), np.array([0, 1])])
    candidates, whole = best_of(fusion(scores).scored(batch), batch, slice(0, 2))
    assert candidates.rows_BK[0].tolist() == [1, *range(3, 202)]
    assert candidates.rows_BK[1].tolist() == list(range(1, 201))  # bought again
    assert whole.numpy() == pytest.approx(scores)
    assert candidates.lengths_B2.tolist() == [[2, 2], [2, 2]]


@given(st.integers(0, 2**32 - 1))
def test_no_item_outside_passes_a_candidate_and_the_others_keep_their_order(seed):
    rng = np.random.default_rng(seed)
    fused = fusion(rng.normal(size=(3, ITEMS)), rng.normal(size=(3, ITEMS)), weights=(1.0, 0.3))
    order = LearnedOrder(*(rng.normal(size=size).astype(np.float32) for size in ((10, 4), (4,), (4,))), 0.1)
    batch = users(rng.integers(0, ITEMS, 3).tolist(), [rng.integers(0, ITEMS, 5) for _ in range(3)])
    scores_BN, fused_BN = LearnedRanker(fused, order).scores(batch), fused.scores(batch)
    candidates, _ = best_of(fused.scored(batch), batch, slice(0, 3))
    for user, rows in enumerate(candidates.rows_BK):
        others = np.setdiff1d(np.arange(ITEMS), [*rows, *batch.histories[user]])
        assert scores_BN[user, rows].min() > scores_BN[user, others].max()
        assert np.array_equal(np.argsort(scores_BN[user, others]), np.argsort(fused_BN[user, others]))


@given(st.integers(0, 2**32 - 1))
def test_one_user_without_torch_has_the_scores_of_many(seed):
    rng = np.random.default_rng(seed)
    parts, weights = rng.normal(size=(3, 2, ITEMS)).astype(np.float32), (1.0, 0.3, 0.2)
    order = LearnedOrder(*(rng.normal(size=size).astype(np.float32) for size in ((13, 4), (4,), (4,))), 0.1)
    batch = users([-1, -1], [rng.integers(0, ITEMS, 5), np.empty(0, int)])
    expected = LearnedRanker(fusion(*parts, weights=weights), order).scores(batch)
    for user, history in enumerate(batch.histories):
        shares_NP = (parts[:, user] * np.array(weights, np.float32)[:, None]).T
        assert reordered(order, shares_NP, history) == pytest.approx(expected[user], abs=1e-4)


def test_an_order_that_adds_nothing_ranks_as_the_fusion():
    rng = np.random.default_rng(1)
    fused = fusion(rng.normal(size=(20, ITEMS)), rng.normal(size=(20, ITEMS)))
    batch = users(rng.integers(0, ITEMS, 20).tolist(), [rng.integers(0, ITEMS, 4) for _ in range(20)])
    ranks = rank_users(batch, {"fused": fused, "learned": LearnedRanker(fused, plain(10))})
    assert ranks["learned"].tolist() == ranks["fused"].tolist()


def test_it_learns_what_a_weighted_sum_cannot_say():
    """Who has a short history takes what the first part says, who has a long one what the second says."""
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(2, 1600, ITEMS)).astype(np.float32)
    parts[:, :, 0] = -9  # the item of all histories
    long = rng.random(1600) < 0.5
    targets = np.where(long, parts[1].argmax(1), parts[0].argmax(1))
    histories = [np.zeros(50 if each else 1, int) for each in long]
    fused = fusion(*parts)
    batch = users(targets, histories)
    learnt, test = (
        EvalBatch(batch.user_rows[part], batch.histories[part], batch.targets[part])
        for part in (slice(1200), slice(1200, 1600))
    )
    order = learn(examples_of([fused], learnt))
    ranks = rank_users(test, {"fused": fused, "learned": LearnedRanker(fused, order)})
    assert (ranks["learned"] == 1).mean() > (ranks["fused"] == 1).mean() + 0.2
    again = learn(examples_of([fused], learnt))
    assert all(np.array_equal(getattr(order, name), getattr(again, name)) for name in ("first_FH", "bias_H", "last_H"))


def test_what_never_differs_among_the_examples_is_not_read():
    """Else its untrained, random weights would order the first item for which it differs."""
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(2, 600, ITEMS)).astype(np.float32)
    parts[1] = 0
    order = learn(examples_of([fusion(*parts)], users(parts[0].argmax(1))))
    share, below, place = 1, 3, 5
    assert (order.first_FH[[share, below]] == 0).all()
    assert (order.first_FH[[0, place]] != 0).any(1).all()


def test_examples_are_the_users_whose_target_is_a_candidate():
    scores = np.arange(ITEMS, 0, -1.0)[None].repeat(3, 0)
    examples = examples_of([fusion(scores)], users([1, 299, 7]))
    assert examples.user_rows.tolist() == [0, 2]
    assert examples.places_U.tolist() == [0, 6]
    assert examples.candidates.rows_BK[:, 0].tolist() == [1, 1]
    others = examples.without(np.array([0, 1]))
    assert (others.user_rows.tolist(), others.places_U.tolist()) == ([2], [6])
    assert others.candidates.shares_BKP.shape == (1, 200, 1)
    twice = examples_of([fusion(scores), fusion(-scores)], users([1, 299, 7]))
    assert twice.user_rows.tolist() == [0, 2, 1], "by each fusion's candidates"
    assert twice.places_U.tolist() == [0, 6, 0]


def test_users_are_encoded_once_for_several_fusions():
    encoded = []

    def encode(rows, histories):
        encoded.append(rows)
        return np.ones((len(rows), ITEMS), np.float32)

    cached = CachedRanker(VectorRanker(np.eye(ITEMS, dtype=np.float32), encode))
    examples_of([replace(fusion(np.ones((3, ITEMS))), parts=(cached,))] * 2, users([1, 299, 7]))
    assert len(encoded) == 1


def test_names_titles_groups_and_pairs():
    names = ["text_only", "per_layer", "id_only", "id_only+cheap", "text_only+id+cheap", "per_layer+id+cheap"]
    names += [name + "+learned" for name in names[3:]]
    assert variant_title("per_layer+id+cheap+learned") == "RA-Rec (per layer) + ID + cheap + learned"
    assert cheap_suffix("per_layer+id+cheap+learned") == "+cheap+learned"
    assert variant_group("per_layer+id+cheap+learned") == 1 + variant_group("per_layer+id+cheap")
    pairs = pairs_of_interest(names, "per_layer")
    learned = {pair for pair in pairs if pair[0].endswith("+learned")}
    assert learned >= {
        ("per_layer+id+cheap+learned", "id_only+cheap+learned"),
        ("per_layer+id+cheap+learned", "text_only+id+cheap+learned"),
        ("per_layer+id+cheap+learned", "per_layer+id+cheap"),
        ("id_only+cheap+learned", "id_only+cheap"),
    }


@pytest.mark.slow
def test_an_order_of_too_few_users_is_left_out(run):
    evaluate = run.config.evaluate.model_copy(update={"learned_users": 40})
    config, lines = run.config.model_copy(update={"evaluate": evaluate}), list[str]()
    made = evaluator.Evaluator(config, run.dataset, run.sources["id"].ranker(), run.neighbours, run.world, lines.append)
    made.rank_untrained()
    assert "id_only+cheap+learned" not in {**made.ranks, **made.validation_ranks}
    assert any("no learned order" in line and "40 validation users" in line for line in lines)


@pytest.fixture(scope="module", params=["{}", "{exclude_seen: false, max_history: 8}"])
def learned(finished, tmp_path_factory, request) -> Run:
    """A finished run whose bundle is of a row in a learned order, by two sets of rules."""
    root = tmp_path_factory.mktemp("learned") / "run"
    shutil.copytree(open_run(finished).root, root)
    overrides = [f"run.dir={root}", f"evaluate={request.param}", "evaluate.learned_users=60", f"export.variant={ROW}"]
    run = open_run(finished, overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "FEWEST", 5)
        run.run(["evaluate", "export"], fresh=True)
    return run


@pytest.mark.slow
def test_a_bundle_serves_what_was_evaluated(learned):
    served, dataset = rarec.load(learned.directory("export")), learned.dataset
    batch = EvalBatch.of(dataset, dataset.targets("test"))
    histories = [[dataset.item_ids[int(item)] for item in history] for history in batch.histories]
    ranks = learned.ranks().set_index(["variant", "user"])["rank"]
    lists = served.recommend(histories, k=10, fallback="none")
    for user, target, items in zip(batch.user_rows, batch.targets, lists, strict=True):
        rank = ranks[ROW, dataset.user_ids[int(user)]]
        place = [entry.item for entry in items].index(dataset.item_ids[int(target)]) + 1 if rank <= 10 else None
        assert rank == (place or rank)
        assert place or dataset.item_ids[int(target)] not in [entry.item for entry in items]
    assert (ranks[ROW] != ranks[ROW.removesuffix("+learned")]).any()
    validation = {row["variant"] for row in read_json(learned.directory("evaluate") / "validation.json")}
    assert {ROW, "id_only+cheap+learned"} <= validation  # so that the best row may be one


@pytest.fixture(scope="module")
def folder(learned, tmp_path_factory) -> Path:
    """The bundle as ONNX graphs and an index, with a client."""
    folder = tmp_path_factory.mktemp("learned_order") / "served"
    write_targets(rarec.load(learned.directory("export")), ["onnx", "faiss"], folder, say=lambda line: None)
    return folder


@pytest.mark.slow
def test_every_form_of_the_bundle_has_its_order(learned, folder):
    served, run = rarec.load(learned.directory("export")), learned.dataset
    everyone = histories(learned, list(map(str, run.user_ids)))[:30]
    listed = served.recommend(everyone, k=10, fallback="none")
    onnx, client = OnnxRecommender(folder, served.row, threads=1), Client(folder, threads=1)
    assert agree(onnx.recommend(everyone, k=10, fallback="none"), listed)
    assert agree(client.recommend(everyone, k=10), listed)
    for rules in (
        {"exclude_seen": not served.rules.asked.exclude_seen},
        {"allow": served.items[3:30]},
        {"deny": [entry.item for entry in listed[0]]},
    ):
        assert agree(onnx.recommend(everyone, **rules), served.recommend(everyone, **rules))
    again = served.rerank(everyone, [served.items] * len(everyone), k=10)
    assert agree(again, listed)
    one, other = (each.explain(everyone[0], served.items[0]).parts for each in (served, onnx))
    assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.slow
def test_a_new_item_would_stand_where_it_stands_when_it_is_added(learned, tmp_path):
    bundle = shutil.copytree(learned.directory("export"), tmp_path / "bundle")
    (tmp_path / "new.jsonl").write_text('{"item": "new", "title": "amber lamp", "brand": "river"}')
    before, after = rarec.load(bundle), rarec.load(with_items(bundle, tmp_path / "new.jsonl"))
    for history in histories(learned, list(map(str, learned.dataset.user_ids)))[:5]:
        listed = after.recommend([history], k=10**6, fallback="none")[0]
        place = before.place(history, "amber lamp", "river")
        assert listed[place.rank - 1].item == "new"
        assert place.score == pytest.approx(listed[place.rank - 1].score, rel=1e-3)
    write_targets(after, ["onnx", "faiss"], tmp_path / "served", say=lambda line: None)
    everyone = histories(learned, list(map(str, learned.dataset.user_ids)))[:20]
    listed = after.recommend(everyone, k=10, fallback="none")
    for form in (OnnxRecommender(tmp_path / "served", after.row, threads=1), Client(tmp_path / "served", threads=1)):
        assert agree(form.recommend(everyone, k=10), listed)


def agree(lists, expected) -> bool:
    """Return whether nearly all lists of items are the same: rounding may move an item whose parts' places are ties."""
    same = [
        [item for item, *_ in own] == [entry.item for entry in other]
        for own, other in zip(lists, expected, strict=True)
    ]
    return sum(same) >= 0.8 * len(same)


@pytest.mark.slow
def test_a_damaged_order_of_an_export_is_refused_with_its_file(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "served")
    (copy / "order.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"order\.npz was altered: .*rarec export"):
        Client(copy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.update(last_H=weights["last_H"] * np.float32("nan")),
        lambda weights: weights.update(first_FH=weights["first_FH"][1:]),
        lambda weights: weights.pop("factor"),
    ],
)
def test_a_damaged_order_is_refused_with_its_file(learned, tmp_path, change):
    bundle = shutil.copytree(learned.directory("export"), tmp_path / "bundle")
    weights = load_file(bundle / ORDER)
    change(weights)
    save_file(weights, bundle / ORDER)
    with pytest.raises(UserError, match=f"{ORDER} was altered"):
        rarec.load(bundle)
    sealed(bundle)
    with pytest.raises(UserError, match=ORDER):
        rarec.load(bundle)
