"""Neighbour tables, by hand and against the plain definition, the same on every engine; and ranking by them."""

import tempfile
from collections import defaultdict
from dataclasses import replace
from itertools import permutations
from math import log, sqrt
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from rarec.data.columns import IN_MEMORY, Scratch
from rarec.data.dataset import PreparedDataset
from rarec.data.engines import PrepareEngine
from rarec.data.engines.duckdb_engine import DuckDBEngine
from rarec.data.engines.table_files import find_files
from rarec.entry import open_run
from rarec.neighbours import counting, table
from rarec.neighbours.ease import ease, training_matrices
from rarec.neighbours.lexical import lexical, plain_texts
from rarec.neighbours.make import read_training_log, write_counts
from rarec.neighbours.ranker import NeighbourRanker
from rarec.neighbours.table import TABLE
from rarec.ranking import EvalBatch
from rarec.stages.run import Run
from tests.engines import needs_spark, on

A, B, C, D = range(4)
HISTORIES = [[A, B, C], [B, A], [A, B, A], [D]]
"""Four users: A and B are bought together three times, A and C, and B and C, once; nobody buys anything with D."""


def log_of(engine: PrepareEngine, histories: list[list[int]], scratch: Path) -> ibis.Table:
    """Return a training log."""
    rows = [(user, item, at) for user, history in enumerate(histories) for at, item in enumerate(history)]
    columns = dict(zip(("user", "item", "position"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({name: pa.array(column, pa.int64()) for name, column in columns.items()}), scratch)
    read = engine.read(find_files(str(scratch), "neighbours"), {name: name for name in columns}, "neighbours")
    return engine.keep("log", read.table)


def rows_of(engine: PrepareEngine, table: ibis.Table) -> list[tuple[int, int, float]]:
    """Return the rows of a neighbour table."""
    return [
        (row["item_row"], row["neighbour_row"], row["score"])
        for batch in engine.batches(table)
        for row in batch.to_pylist()
    ]


def test_items_of_the_same_users_are_neighbours(engine: PrepareEngine, tmp_path: Path) -> None:
    """Users: A 3, B 3, C 1, D 1. Who buys an item twice counts once."""
    found = rows_of(engine, counting.cooccurrence(log_of(engine, HISTORIES, tmp_path / "log.parquet"), 9, 0.0))
    near, far = 3 / 3, 1 / sqrt(3)
    expected = [(A, B, near), (A, C, far), (B, A, near), (B, C, far), (C, A, far), (C, B, far)]
    assert found == [(item, neighbour, pytest.approx(score)) for item, neighbour, score in expected]


def test_what_follows_within_a_few_steps_is_a_neighbour(engine: PrepareEngine, tmp_path: Path) -> None:
    """A to B twice, at one step; A to C once, at two; B to A twice; B to C once. Interactions: A 4, B 3, C 1."""
    found = rows_of(engine, counting.transition(log_of(engine, HISTORIES, tmp_path / "log.parquet"), 9, 2, 0.5, 1.0))
    expected = [
        (A, B, 2 / (sqrt(12) + 1)),
        (A, C, 0.5 / (sqrt(4) + 1)),
        (B, A, 2 / (sqrt(12) + 1)),
        (B, C, 1 / (sqrt(3) + 1)),
    ]
    assert found == [(item, neighbour, pytest.approx(score)) for item, neighbour, score in expected]


@needs_spark
def test_duckdb_and_spark_write_the_same_tables_to_the_last_bit(finished: Path, tmp_path: Path) -> None:
    """From the files of a prepared dataset; many scores are equal where the tables are cut."""
    config, dataset = open_run(finished).config, open_run(finished).dataset
    fields = config.neighbours.model_copy(update={"top": 3, "longest": 4, "shrinkage": 1.5})
    for model in ("cooccurrence", "transition"):
        written = []
        for name in ("duckdb", "spark"):
            (tmp_path / model / name).mkdir(parents=True)
            write_counts(model, fields, on(name, config.prepare), dataset, tmp_path / model / name, holdout=0.2)
            table = pq.read_table(tmp_path / model / name / TABLE)
            written.append(table.sort_by([("item_row", "ascending"), ("neighbour_row", "ascending")]).to_pylist())
        assert written[0] == written[1]
        assert len({row["score"] for row in written[0]}) < len(written[0])


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0.0, 2.5]),
)
@settings(max_examples=30)
def test_tables_equal_their_definition(histories, top, steps, shrinkage):
    both, follow = defaultdict(float), defaultdict(float)
    users, size = defaultdict(int), defaultdict(int)
    for history in histories:
        for item in history:
            size[item] += 1
        for item in set(history):
            users[item] += 1
        for pair in permutations(set(history), 2):
            both[pair] += 1
        for at, item in enumerate(history):
            for gap in range(1, steps + 1):
                if at + gap < len(history) and history[at + gap] != item:
                    follow[item, history[at + gap]] += 0.5 ** (gap - 1)
    with tempfile.TemporaryDirectory() as scratch:
        engine = DuckDBEngine(Path(scratch) / "spill")
        log = log_of(engine, histories, Path(scratch) / "log.parquet")
    for counted, counts, found in (
        (both, users, counting.cooccurrence(log, top, shrinkage)),
        (follow, size, counting.transition(log, top, steps, 0.5, shrinkage)),
    ):
        scored = [
            (one, other, np.float32(value / (sqrt(counts[one] * counts[other]) + shrinkage)))
            for (one, other), value in counted.items()
        ]
        scored.sort(key=lambda row: (row[0], -row[2], row[1]))
        best = [row for at, row in enumerate(scored) if at < top or scored[at - top][0] != row[0]]
        assert rows_of(engine, found) == [(one, other, pytest.approx(score)) for one, other, score in best]
    engine.close()


def test_ease_is_the_closed_form():
    """Row i of B is what a user's having item i says of the others."""
    seen_UN = sparse.csr_matrix(np.random.default_rng(0).random((30, 7)) < 0.3, dtype=float)
    inverse = np.linalg.inv(seen_UN.T @ seen_UN.toarray() + 2.5 * np.eye(7))
    expected = -inverse / inverse.diagonal()
    np.fill_diagonal(expected, 0)
    found = pairs(ease([seen_UN[:11], seen_UN[11:]], 7, 2.5, 3))
    best = {(i, j) for i in range(7) for j in np.argsort(-expected[i])[:3] if expected[i, j] > 0}
    assert set(found) == best
    assert all(found[pair] == pytest.approx(expected[pair], rel=1e-5) for pair in best)


def test_ease_reads_each_training_item_of_a_user_once(finished):
    dataset = open_run(finished).dataset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreparedDataset.user_blocks, "__defaults__", (20,))
        parts = list(training_matrices(dataset))
    assert len(parts) > 1
    seen_UN = sparse.vstack(parts).tocsr()
    for user in range(5):
        trained = dataset.sequence(user)[: dataset.train_length_U[user]]
        assert seen_UN[user].nonzero()[1].tolist() == sorted(set(trained.tolist()))
    assert seen_UN.max() == 1


@pytest.mark.parametrize("model", ["ease", "lexical"])
def test_a_catalogue_too_large_for_a_model_has_a_table_without_rows(model, finished, tmp_path):
    said = []
    fields = [f"run.dir={tmp_path}", f"neighbours.models=[{model}]", f"neighbours.{model}_items=3"]
    run = Run(finished, fields, say=said.append)
    run.run(["prepare", "neighbours"])
    assert not run.neighbours[model].table_NN.nnz
    assert any(f"neighbours.{model}_items" in line and "nothing" in line for line in said)


def test_more_neighbours_than_there_are_items_are_all_kept_and_that_is_said(finished, tmp_path):
    said = []
    Run(finished, [f"run.dir={tmp_path}", "neighbours.top=99"], say=said.append).run(["prepare", "neighbours"])
    assert sum("neighbours.top, 99" in line for line in said) == 4
    rows = open_run(finished, [f"run.dir={tmp_path}", "neighbours.top=99"]).neighbours["ease"].table_NN
    assert not rows.diagonal().any()


def pairs(batches):
    """Return scores by item and neighbour."""
    rows = [row for batch in batches for row in batch.to_pylist()]
    return {(row["item_row"], row["neighbour_row"]): row["score"] for row in rows}


def test_items_whose_texts_share_words_are_neighbours():
    texts = ["red Lamp", "Lamp, green", "a chair", "", "red lamp!"]
    near = pairs(lexical(texts, 2))
    assert set(near) == {(0, 4), (0, 1), (1, 0), (1, 4), (4, 0), (4, 1)}
    assert near[0, 4] == pytest.approx(1)
    assert list(lexical(["", " "], 2)) == []


def test_a_rare_word_that_stands_twice_counts_for_more():
    """Of four items `lamp` is in two, `red` in three: (1 + log count) * (1 + log(5 / (1 + items with it))), by hand."""
    lamp, red = 1 + log(5 / 3), 1 + log(5 / 4)
    near = pairs(lexical(["lamp lamp red", "red Lamp", "red", "chair"], 3))
    twice = (1 + log(2)) * lamp
    assert near[0, 1] == near[1, 0]
    assert near[0, 1] == pytest.approx((twice * lamp + red * red) / sqrt((twice**2 + red**2) * (lamp**2 + red**2)))
    assert near[0, 2] == pytest.approx(red / sqrt(twice**2 + red**2))
    assert near[1, 2] == pytest.approx(red / sqrt(lamp**2 + red**2))
    assert not {item for pair in near for item in pair} & {3}


def test_a_missing_title_is_no_word_and_one_that_holds_its_words_is():
    assert list(plain_texts(["item", "item 7"], ["of oak", ""], "item")) == ["of oak", "item 7 "]


def test_the_newest_of_a_long_history_count_and_none_of_the_held_out(engine, finished):
    dataset = open_run(finished).dataset
    for holdout in (0.0, 0.3):
        log = engine.keep(f"log_{holdout > 0}", read_training_log(engine, dataset.directory, 3, holdout))
        rows = [row for batch in engine.batches(log) for row in batch.to_pylist()]
        ends_U = dataset.train_length_U - (dataset.held_out_U(holdout) if holdout else 0)
        expected = [
            (user, at, int(dataset.sequence(user)[at]))
            for user, end in enumerate(ends_U)
            for at in range(max(end - 3, 0), end)
        ]
        assert (ends_U > 3).any()
        assert sorted((row["user"], row["position"], row["item"]) for row in rows) == expected


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12, unique=True), st.integers(1, 5))
@settings(deadline=None)
def test_a_table_is_read_as_it_was_written_in_any_order_in_memory_or_not(pairs, at_a_time):
    dense = np.zeros((5, 5), np.float32)
    for score, (item, near) in enumerate(pairs, 1):
        dense[item, near] = score
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "ROWS", at_a_time)
        rows, near = (np.array([pair[column] for pair in pairs], np.int32) for column in (0, 1))
        table.write_table([table.batch_of(rows, near, dense[rows, near])], Path(name))
        for scratch in (IN_MEMORY, Scratch(0, Path(name))):
            assert (table.read_table(Path(name) / table.TABLE, 5, scratch).toarray() == dense).all()


@pytest.mark.parametrize("pair", [(0, 5), (-1, 0), (5, 0), (0, -1)])
def test_a_table_of_items_beyond_the_catalogue_is_refused(pair, tmp_path):
    written = table.batch_of(*(np.array([row], np.int32) for row in pair), np.ones(1, np.float32))
    table.write_table([written], tmp_path)
    with pytest.raises(ValueError, match="catalogue"):
        table.read_table(tmp_path / table.TABLE, 5)


def test_the_newest_items_score_their_neighbours():
    near = sparse.csr_matrix(np.array([[0, 0.5, 0], [0, 0, 0.25], [0, 0, 0]], np.float32))
    batch = EvalBatch(np.arange(3), [np.array([1, 0]), np.array([], int), np.array([0, 1])], np.zeros(3, int))
    scores_BN = NeighbourRanker(near, newest=2, decay=0.5).scores(batch)
    assert scores_BN**2 == pytest.approx(np.array([[0, 0.5, 0.125], [0, 0, 0], [0, 0.25, 0.25]]))
    listed = replace(batch, targets=np.array([1, 1, 2]))
    assert NeighbourRanker(near, newest=2, decay=0.5).lists_targets(listed).tolist() == [True, False, True]
    newest = NeighbourRanker(near, newest=1, decay=0.5).scores(batch)
    assert newest**2 == pytest.approx(np.array([[0, 0.5, 0], [0, 0, 0], [0, 0, 0.25]]))
