"""Several questions of a user, histories that are cut, items that may come again: how these rank and count."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from rarec.data.dataset import PreparedDataset
from rarec.data.tables import read_columns
from rarec.distributed.world import SINGLE
from rarec.entry import open_run
from rarec.evaluation.evaluator import Evaluator
from rarec.evaluation.fusion import fuse
from rarec.ranking.metrics import mean_intervals
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import VectorRanker
from rarec.storage.files import read_json
from tests.datasets import by_hand

ANN, BEA, CY, DEE = range(4)


@pytest.fixture
def windows() -> PreparedDataset:
    """Return ann, who trains, validates and tests (twice each); bea, without validation; cy and dee, without test."""
    sequences = [[0, 1, 2, 0, 3, 4], [1, 5, 5], [2, 3, 4], [0]]
    dataset = by_hand(sequences, pa.array([f"i{row}" for row in range(6)]), pa.array(["ann", "bea", "cy", "dee"]))
    parts = {"train_length_U": [2, 2, 1, 1], "validation_U": [2, -1, 1, -1], "test_U": [4, 2, -1, -1]}
    return replace(dataset, **{name: np.array(values, np.int32) for name, values in parts.items()})


def test_every_interaction_of_a_window_is_a_question_with_its_own_history(windows: PreparedDataset) -> None:
    test = EvalBatch.of(windows, windows.targets("test", every=True))
    assert list(zip(test.user_rows, test.targets, strict=True)) == [(ANN, 3), (ANN, 4), (BEA, 5)]
    assert [history.tolist() for history in test.histories] == [[0, 1, 2, 0], [0, 1, 2, 0, 3], [1, 5]]
    assert test.places.tolist() == [1, 2, 1]
    validation = windows.targets("validation", every=True)
    assert validation.positions.tolist() == [2, 3, 1, 2]
    assert validation.user_rows.tolist() == [ANN, ANN, CY, CY]
    assert windows.targets("test").item_rows.tolist() == [3, 5]
    assert set(windows.targets("test", 1, every=True).user_rows) in (
        {ANN},
        {BEA},
    )  # a number of users, not of questions


def test_only_the_newest_items_of_a_history_are_known(windows: PreparedDataset) -> None:
    targets = windows.targets("test", every=True)
    cut = EvalBatch.of(windows, targets, newest=2)
    assert [history.tolist() for history in cut.histories] == [[2, 0], [0, 3], [1, 5]]
    shuffled = EvalBatch.of(windows, targets, newest=2, shuffled_by=1)
    assert [sorted(history.tolist()) for history in shuffled.histories] == [[0, 2], [0, 3], [1, 5]]


def test_a_seen_item_competes_where_it_may_be_recommended_again(windows: PreparedDataset) -> None:
    """By these scores item 0 comes first: of the history of ann, it takes a place before her targets, or does not."""
    ranker = VectorRanker.of_counts(np.array([9, 1, 1, 5, 4, 0]))
    targets = windows.targets("test", every=True)
    assert ranker.ranks(EvalBatch.of(windows, targets)).tolist() == [1, 1, 5]
    again = EvalBatch.of(windows, targets, exclude_seen=False)
    assert ranker.ranks(again).tolist() == [2, 3, 6]
    assert ranker.top_k(again, 2)[0].tolist() == [0, 3]
    assert ranker.top_k(again.part(np.array([2])), 1).tolist() == [[0]]


def test_weights_of_a_fusion_are_fitted_on_what_competes() -> None:
    """Everyone takes the last item again: a model that says so gets all weight, and none where it may not be taken."""
    last = VectorRanker(
        np.eye(4, dtype=np.float32), lambda rows, histories: np.eye(4, dtype=np.float32)[[h[-1] for h in histories]]
    )
    first = VectorRanker.of_counts(np.array([9, 5, 2, 1]))
    histories = [np.array([user % 4]) for user in range(40)]
    asked = EvalBatch(np.arange(40), histories, np.arange(40) % 4)
    shares = fuse({"last": last, "first": first}, replace(asked, exclude_seen=False), np.ones(4, int)).parts
    assert shares["last"]["share"] > 0.99


def test_the_questions_of_a_user_are_drawn_together() -> None:
    """Of two users, one with three questions: a resample has the mean of either, or of all four questions."""
    values, users = {"hit": np.array([1.0, 1.0, 0.0, 0.0])}, np.array([4, 4, 4, 9])
    interval = mean_intervals(values, 4000, users=users)["hit"]
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.0, 2 / 3)
    alone = mean_intervals(values, 4000, users=np.full(4, 7))["hit"]
    assert (alone.low, alone.high) == (0.5, 0.5)
    apart = np.array([3, 1, 8, 2])
    assert mean_intervals(values, 300, 5, apart) == mean_intervals(values, 300, 5)


def test_an_evaluation_of_all_questions_with_refitted_baselines(finished, tmp_path) -> None:
    split = "prepare.split={kind: temporal, validation_share: 0.2, test_share: 0.2}"
    asked = "evaluate={targets: all, exclude_seen: false, max_history: 3, refit: validation, resamples: 50}"
    run = open_run(
        finished, [f"run.dir={tmp_path / 'run'}", split, asked, "neighbours.models=[cooccurrence, transition]"]
    )
    run.run(["prepare", "ids", "neighbours"])
    lines: list[str] = []
    ids = run.sources["id"].ranker()
    evaluator = Evaluator(run.config, run.dataset, ids, run.neighbours, world=SINGLE, say=lines.append)
    evaluator.rank_untrained()
    evaluator.write(tmp_path)
    dataset = run.dataset
    ranks = read_columns(tmp_path / "ranks.parquet").to_pandas()
    count = int((dataset.lengths_U - dataset.test_U)[dataset.test_U >= 0].sum())
    own = ranks[ranks.variant == "id_only"]
    assert len(own) == count > (dataset.test_U >= 0).sum()
    assert (own.groupby("user").place.max() == own.groupby("user").size()).all()
    rows = {row["variant"] for row in read_json(tmp_path / "metrics.json")}
    assert {"cheap/refit", "id_only+cheap/refit"} <= rows
    assert not {"id_only/refit", "popularity/refit"} & rows
    before, after = (ranks[ranks.variant == name]["rank"].to_numpy() for name in ("cheap", "cheap/refit"))
    assert (before != after).any()
    pairs = {(row["variant"], row["baseline"]) for row in read_json(tmp_path / "comparisons.json")}
    assert ("cheap/refit", "cheap") in pairs


def test_refitted_counts_are_of_everything_before_the_test(windows: PreparedDataset) -> None:
    again = windows.refitted()
    assert again.train_length_U.tolist() == [4, 2, 3, 1]
    assert again.train_counts_N.tolist() == [3, 2, 2, 1, 1, 1]
    assert again.test_U.tolist() == windows.test_U.tolist()
