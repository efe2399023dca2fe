"""Neighbour tables, by hand and against the plain definition, the same on every engine; and ranking by them."""

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import permutations
from math import log, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from rarec.config.neighbours import NeighbourConfig, Neighbours
from rarec.data.dataset import PreparedDataset
from rarec.data.engines import PrepareEngine, open_engine
from rarec.data.engines.duckdb_engine import DuckDBEngine
from rarec.data.engines.table_files import find_files
from rarec.data.tables import IN_MEMORY, Scratch
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.neighbours import base
from rarec.neighbours.base import SCHEMA, TABLE, NeighbourModel, batch_of, read_table, write_table
from rarec.neighbours.counting import read_training_log
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import NeighbourRanker
from rarec.stages.run import Run
from tests.engines import needs_spark, on

A, B, C, D = range(4)
HISTORIES = [[A, B, C], [B, A], [A, B, A], [D]]
"""Four users: A and B are bought together three times, A and C, and B and C, once; nobody buys anything with D."""


def log_of(engine: PrepareEngine, histories: list[list[int]], scratch: Path) -> ibis.Table:
    """Return a training log."""
    rows = [(user, item, place) for user, history in enumerate(histories) for place, item in enumerate(history)]
    columns = dict(zip(("user", "item", "position"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({name: pa.array(column, pa.int64()) for name, column in columns.items()}), scratch)
    read = engine.read(find_files(str(scratch), "neighbours"), {name: name for name in columns})
    return engine.keep("log", read)


def model(name: str, open_engine: Any = None, **settings: Any) -> Any:
    """Return a neighbour model by its name."""
    section = Neighbours(**settings)
    return section.class_of(name)(section.config_of(name), open_engine)


def counted(name: str, engine: PrepareEngine, log: ibis.Table, **settings: Any) -> list[tuple[int, int, float]]:
    """Return the rows of the table of a training log."""
    return rows_of(engine.batches(model(name, **settings).expression(log)))


def rows_of(batches: Iterable[pa.RecordBatch]) -> list[tuple[int, int, float]]:
    """Return the rows of a neighbour table."""
    return [tuple(row.values()) for batch in batches for row in batch.select(SCHEMA.names).to_pylist()]


def catalogue(titles: list[str], texts: list[str] | None = None) -> Any:
    """Return what a model of words reads of a dataset."""
    return SimpleNamespace(titles=titles, texts=texts or [""] * len(titles), untitled="item", n_items=len(titles))


def test_items_of_the_same_users_are_neighbours(engine: PrepareEngine, tmp_path: Path) -> None:
    """Users: A 3, B 3, C 1, D 1. Who buys an item twice counts once."""
    rows = counted("cooccurrence", engine, log_of(engine, HISTORIES, tmp_path / "log.parquet"), top=9)
    near, far = 3 / 3, 1 / sqrt(3)
    expected = [(A, B, near), (A, C, far), (B, A, near), (B, C, far), (C, A, far), (C, B, far)]
    assert rows == [(item, neighbour, pytest.approx(score)) for item, neighbour, score in expected]


def test_what_follows_within_a_few_steps_is_a_neighbour(engine: PrepareEngine, tmp_path: Path) -> None:
    """A to B twice, at one step; A to C once, at two; B to A twice; B to C once. Interactions: A 4, B 3, C 1."""
    log = log_of(engine, HISTORIES, tmp_path / "log.parquet")
    rows = counted("transition", engine, log, top=9, steps=2, shrinkage=1.0)
    expected = [
        (A, B, 2 / (sqrt(12) + 1)),
        (A, C, 0.5 / (sqrt(4) + 1)),
        (B, A, 2 / (sqrt(12) + 1)),
        (B, C, 1 / (sqrt(3) + 1)),
    ]
    assert rows == [(item, neighbour, pytest.approx(score)) for item, neighbour, score in expected]


@needs_spark
def test_duckdb_and_spark_write_the_same_tables_to_the_last_bit(finished: Path, tmp_path: Path) -> None:
    """From the files of a prepared dataset; many scores are equal where the tables are cut."""
    config, dataset = open_run(finished).config, open_run(finished).dataset
    for name in ("cooccurrence", "transition"):
        written = []
        for engine in ("duckdb", "spark"):
            opened = partial(open_engine, on(engine, config.prepare), tmp_path / "spill")
            made = model(name, opened, top=3, longest=4, shrinkage=1.5)
            written.append(rows_of(made.rows(dataset)))
        assert sorted(written[0]) == sorted(written[1])
        assert len({score for *_, score in written[0]}) < len(written[0])


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
    for name, pairs, counts in (("cooccurrence", both, users), ("transition", follow, size)):
        scored = [
            (one, other, np.float32(value / (sqrt(counts[one] * counts[other]) + shrinkage)))
            for (one, other), value in pairs.items()
        ]
        scored.sort(key=lambda row: (row[0], -row[2], row[1]))
        best = [row for at, row in enumerate(scored) if at < top or scored[at - top][0] != row[0]]
        rows = counted(name, engine, log, top=top, steps=steps, shrinkage=shrinkage)
        assert rows == [(one, other, pytest.approx(score)) for one, other, score in best]
    engine.close()


def test_ease_is_the_closed_form_of_each_users_training_items(finished):
    """Row i of B is what a user's having item i says of the others; an item that a user has twice counts once."""
    dataset = open_run(finished).dataset
    seen_UN = np.zeros((dataset.n_users, dataset.n_items))
    for user, length in enumerate(dataset.train_length_U):
        seen_UN[user, dataset.sequence(user)[:length]] = 1
    inverse = np.linalg.inv(seen_UN.T @ seen_UN + 2.5 * np.eye(dataset.n_items))
    expected = -inverse / inverse.diagonal()
    np.fill_diagonal(expected, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreparedDataset.user_blocks, "__defaults__", (20,))
        found_NN = model("ease", ease_penalty=2.5, top=3).fit(dataset).toarray()
    for found_N, expected_N in zip(found_NN, expected, strict=True):
        least = max(np.sort(expected_N)[-3], 0)
        assert found_N == pytest.approx(np.where(expected_N >= least, expected_N, 0).clip(0), rel=1e-5)


@pytest.mark.parametrize("name", ["ease", "lexical"])
def test_a_catalogue_too_large_for_a_model_has_a_table_without_rows(name, finished, tmp_path):
    said = []
    fields = [f"run.dir={tmp_path}", f"neighbours.models=[{name}]", f"neighbours.{name}_items=3"]
    run = Run(finished, fields, say=said.append)
    run.run(["prepare", "neighbours"])
    assert not run.neighbours[name].table_NN.nnz
    assert any(f"neighbours.{name}_items" in line and "nothing" in line for line in said)


def test_more_neighbours_than_there_are_items_are_all_kept_and_that_is_said(finished, tmp_path):
    said = []
    Run(finished, [f"run.dir={tmp_path}", "neighbours.top=99"], say=said.append).run(["prepare", "neighbours"])
    assert sum("neighbours.top, 99" in line for line in said) == 5
    rows = open_run(finished, [f"run.dir={tmp_path}", "neighbours.top=99"]).neighbours["ease"].table_NN
    assert not rows.diagonal().any()


class Given(NeighbourModel):
    """Its scores are those of the dataset."""

    title = "given"

    def fit(self, dataset):
        return dataset.scores_NN


def test_the_best_neighbours_above_zero_are_kept_without_the_item_itself_and_ties_go_to_the_smaller_row():
    scores_NN = sparse.csr_matrix(np.array([[9, 2, 3, 2], [0, 1, -1, 0], [1, 0, 0, 1], [1, 2, 3, 4]], np.float32))
    given = Given(NeighbourConfig(top=2), None)
    rows = rows_of(given.rows(SimpleNamespace(scores_NN=scores_NN, n_items=4)))
    assert rows == [(0, 2, 3), (0, 1, 2), (2, 0, 1), (2, 3, 1), (3, 2, 3), (3, 1, 2)]


@pytest.mark.parametrize("scores", [np.ones((4, 4)), sparse.csr_matrix((3, 4)), None])
def test_what_is_no_sparse_matrix_of_items_is_refused(scores):
    with pytest.raises(UserError, match=r"`neighbours.models`: Given\.fit returns.*\n.*\(4, 4\)"):
        Given(NeighbourConfig(top=2), None).rows(SimpleNamespace(scores_NN=scores, n_items=4))


def test_items_whose_texts_share_words_are_neighbours():
    near_NN = model("lexical", top=2).fit(catalogue(["red Lamp", "Lamp, green", "a chair", "", "red lamp!"])).toarray()
    assert list(zip(*near_NN.nonzero(), strict=True)) == [(0, 1), (0, 4), (1, 0), (1, 4), (4, 0), (4, 1)]
    assert near_NN[0, 4] == pytest.approx(1)
    assert not model("lexical", top=2).fit(catalogue(["", " "])).nnz


def test_a_rare_word_that_stands_twice_counts_for_more():
    """Of four items `lamp` is in two, `red` in three: (1 + log count) * (1 + log(5 / (1 + items with it))), by hand."""
    lamp, red = 1 + log(5 / 3), 1 + log(5 / 4)
    near = model("lexical", top=3).fit(catalogue(["lamp lamp red", "red Lamp", "red", "chair"])).toarray()
    twice = (1 + log(2)) * lamp
    assert near[0, 1] == near[1, 0]
    assert near[0, 1] == pytest.approx((twice * lamp + red * red) / sqrt((twice**2 + red**2) * (lamp**2 + red**2)))
    assert near[0, 2] == pytest.approx(red / sqrt(twice**2 + red**2))
    assert near[1, 2] == pytest.approx(red / sqrt(lamp**2 + red**2))
    assert not near[3].any()


def test_a_missing_title_is_no_word_and_one_that_holds_its_words_is():
    near_NN = model("lexical").fit(catalogue(["item", "item", "item 7", "item 8"], ["of oak", "of elm", "", ""]))
    assert (near_NN.toarray() > 0).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize("refit", [False, True])
def test_the_newest_of_a_long_history_count(engine, finished, refit):
    dataset = open_run(finished).dataset
    dataset = dataset.refitted() if refit else dataset
    log = engine.keep("log", read_training_log(engine, dataset, 3))
    rows = [row for batch in engine.batches(log) for row in batch.to_pylist()]
    ends_U = dataset.train_length_U
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
        patch.setattr(base, "ROWS", at_a_time)
        rows, near = (np.array([pair[column] for pair in pairs], np.int32) for column in (0, 1))
        write_table([batch_of(rows, near, dense[rows, near])], Path(name))
        for scratch in (IN_MEMORY, Scratch(0, Path(name))):
            assert (read_table(Path(name) / TABLE, 5, scratch).toarray() == dense).all()


@pytest.mark.parametrize("pair", [(0, 5), (-1, 0), (5, 0), (0, -1)])
def test_a_table_of_items_beyond_the_catalogue_is_refused(pair, tmp_path):
    written = batch_of(*(np.array([row], np.int32) for row in pair), np.ones(1, np.float32))
    write_table([written], tmp_path)
    with pytest.raises(ValueError, match="catalogue"):
        read_table(tmp_path / TABLE, 5)


def test_the_newest_items_score_their_neighbours():
    near = sparse.csr_matrix(np.array([[0, 0.5, 0], [0, 0, 0.25], [0, 0, 0]], np.float32))
    batch = EvalBatch(np.arange(3), [np.array([1, 0]), np.array([], int), np.array([0, 1])], np.zeros(3, int))
    scores_BN = NeighbourRanker(near, newest=2, decay=0.5).scores(batch)
    assert scores_BN**2 == pytest.approx(np.array([[0, 0.5, 0.125], [0, 0, 0], [0, 0.25, 0.25]]))
    listed = replace(batch, targets=np.array([1, 1, 2]))
    assert NeighbourRanker(near, newest=2, decay=0.5).lists_targets(listed).tolist() == [True, False, True]
    newest = NeighbourRanker(near, newest=1, decay=0.5).scores(batch)
    assert newest**2 == pytest.approx(np.array([[0, 0.5, 0], [0, 0, 0], [0, 0, 0.25]]))
