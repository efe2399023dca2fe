"""Coverage, novelty and distance of lists: worked out by hand, then on a finished run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rarec.evaluation.lists import ListMetrics, distance, novelty, self_information
from rarec.evaluation.results import LIST_METRICS, LISTED, headline_metrics
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import VectorRanker, rank_users
from rarec.storage.files import read_json
from tests.test_prepare import make, write

ITEMS = np.array([[2, 0], [0, 3], [-1, 0], [1, 1], [0, 0]], np.float32)


def test_novelty_is_the_mean_self_information_of_the_items_that_are_there() -> None:
    bits_N = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    lists = np.array([[0, 1, 2], [3, -1, -1], [-1, -1, -1]])
    assert novelty(lists, bits_N).tolist() == [7 / 3, 8.0, 0.0]


def test_distance_is_the_mean_over_pairs_of_one_minus_the_cosine() -> None:
    """Pairs of the first list: right angles twice, and opposite; the item without a vector is at 1 from any other."""
    lists = np.array([[0, 1, 2], [0, 3, -1], [0, 0, -1], [4, 0, -1], [1, -1, -1], [-1, -1, -1]])
    expected = [(1 + 2 + 1) / 3, 1 - np.sqrt(0.5), 0, 1, 0, 0]
    np.testing.assert_allclose(distance(lists, ITEMS), expected, atol=1e-6)


def test_an_items_share_is_that_of_the_users_who_have_it_in_training(tmp_path: Path) -> None:
    """Of four users with training interactions; two have a, one of them twice; nobody trains on d."""
    log = [("u1", item, time) for time, item in enumerate("abacd")]
    log += [("u2", item, time) for time, item in enumerate("acb")]
    log += [("u3", item, time) for time, item in enumerate("bac")] + [("u4", "b", 0)]
    write(tmp_path, log, [(name, name, "", "") for name in "abcd"])
    dataset = make(tmp_path, repeats="keep", min_user_interactions=1)
    assert dataset.train_counts_N.tolist() == [3, 3, 0, 0]
    assert self_information(dataset).tolist() == [1.0, pytest.approx(np.log2(4 / 3)), 2.0, 2.0]


def test_lists_are_those_of_the_ranker_and_leave_its_ranks_as_they_are() -> None:
    rng = np.random.default_rng(0)
    users, items = (rng.normal(size=(count, 8)).astype(np.float32) for count in (50, 700))
    ranker = VectorRanker(items, lambda rows, histories: users[rows])
    histories = [rng.choice(700, 5) for _ in range(50)]
    batch = EvalBatch(np.arange(50), histories, rng.integers(700, size=50))
    lists: list[Any] = []
    ranks = rank_users(batch, {"a": ranker}, users_at_a_time=16, top=LISTED, listed=lambda *found: lists.append(found))
    assert ranks["a"].tolist() == rank_users(batch, {"a": ranker}, users_at_a_time=16)["a"].tolist()
    assert {name for name, _ in lists} == {"a"}
    assert np.concatenate([rows for _, rows in lists]).tolist() == ranker.top_k(batch, LISTED).tolist()


def test_the_figures_of_a_run_are_those_of_its_lists(run) -> None:
    rows = read_json(run.directory("evaluate") / "metrics.json")
    found = {(row["variant"], row["metric"]): row for row in rows}
    names = {variant for variant, metric in found if metric in LIST_METRICS}
    assert names == {variant for variant, _ in found if "/" not in variant}
    metrics = ListMetrics(run.dataset, run.sources["id"].items_NE)
    ranker, batch = run.sources["id"].ranker(), EvalBatch.of(run.dataset, run.dataset.targets("test"))
    top = ranker.top_k(batch, LISTED)
    metrics.add("id_only", top)
    for row in metrics.rows(resamples=200, seed=run.config.run.seed):
        assert row == pytest.approx(found["id_only", row["metric"]])
    assert found["id_only", "coverage@10"]["value"] == len(np.unique(top)) / run.dataset.n_items
    assert found["id_only", "coverage@10"]["low"] is None
    popular = found["popularity", "novelty@10"]["value"]
    assert popular == min(row["value"] for (_, metric), row in found.items() if metric == "novelty@10")


def test_they_are_no_headline_whatever_the_cutoffs() -> None:
    assert headline_metrics([*LIST_METRICS, "hr@3", "ndcg@3", "mrr"]) == ["hr@3", "mrr", "ndcg@3"]
