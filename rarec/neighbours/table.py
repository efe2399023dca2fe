"""A neighbour table: for each item its nearest other items, best first, with scores above 0.

Shape letters: N catalogue, M neighbours kept, P pairs of an item and a neighbour.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from rarec.data import tables
from rarec.data.columns import IN_MEMORY, Scratch

Rows = npt.NDArray[np.integer]

TABLE = "neighbours.parquet"
ROWS = 1 << 20
"""Rows read at a time."""
SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in {"item_row": pa.int32(), "neighbour_row": pa.int32(), "score": pa.float32()}.items()
    ]
)


def nearest(item: int, scores_N: npt.NDArray[np.float32], top: int) -> pa.RecordBatch:
    """Return the rows of one item: its M best neighbours with a score above 0; equal scores go to the smaller row.

    Args:
        item: row of the item.
        scores_N: of all items; that of the item itself is set to 0.
        top: M.
    """
    scores_N[item] = 0
    least = np.partition(scores_N, -top)[-top] if top < len(scores_N) else 0.0
    near = np.flatnonzero((scores_N >= least) & (scores_N > 0))
    best = near[np.lexsort((near, -scores_N[near]))][:top]
    return batch_of(np.full(len(best), item), best, scores_N[best])


def batch_of(rows: Rows, neighbours: Rows, scores: npt.NDArray[np.float32]) -> pa.RecordBatch:
    """Return rows of a table."""
    return pa.RecordBatch.from_pydict({"item_row": rows, "neighbour_row": neighbours, "score": scores})


def pairs_of(table_NN: sparse.csr_matrix) -> pa.RecordBatch:
    """Return all rows of a table, by item."""
    pairs = table_NN.tocoo()
    return batch_of(pairs.row, pairs.col, pairs.data)


def write_table(batches: Iterable[pa.RecordBatch], directory: Path) -> int:
    """Write a table; return the number of its rows."""
    return tables.write_rows(batches, directory / TABLE, SCHEMA)


def read_table(path: Path, n_items: int, scratch: Scratch = IN_MEMORY) -> sparse.csr_matrix:
    """Read a table as a sparse matrix, (N, N), some of its rows at a time.

    Args:
        path: of the table.
        n_items: N.
        scratch: where the matrix is kept.

    Raises:
        ValueError: an item is not in the catalogue.
        KeyError: the file has other columns.
    """
    with pq.ParquetFile(path) as file:
        starts_N = np.zeros(n_items + 1, np.int64)
        for rows, near, _ in _parts(file):
            if min(rows.min(), near.min()) < 0 or max(rows.max(), near.max()) >= n_items:
                raise ValueError("an item is not in the catalogue")
            items, counts = np.unique(rows, return_counts=True)
            starts_N[items + 1] += counts
        starts_N, pairs = starts_N.cumsum(), file.metadata.num_rows
        near_P, scores_P = scratch.zeros((pairs,), np.int32), scratch.zeros((pairs,), np.float32)
        free_N = starts_N[:-1].copy()
        for rows, near, scores in _parts(file):  # in any order: items that were added later stand at the end
            order = np.argsort(rows, kind="stable")
            items, firsts, counts = np.unique(rows[order], return_index=True, return_counts=True)
            places = np.repeat(free_N[items] - firsts, counts) + np.arange(len(rows))
            near_P[places], scores_P[places] = near[order], scores[order]
            free_N[items] += counts
    return sparse.csr_matrix((scores_P, near_P, starts_N), (n_items, n_items))


def _parts(file: pq.ParquetFile) -> Iterator[tuple[Rows, Rows, npt.NDArray[np.float32]]]:
    """Yield rows, neighbours and scores, some at a time."""
    for batch in file.iter_batches(ROWS, use_threads=False):
        rows, near, scores = (batch[name].to_numpy() for name in SCHEMA.names)
        yield rows, near, scores
