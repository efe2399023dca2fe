"""A neighbour table: for each item its nearest other items, best first, with scores above 0.

Shape letters: N catalogue, M neighbours kept.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from rarec.data import tables

Rows = npt.NDArray[np.integer]

TABLE = "neighbours.parquet"
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


def write_table(batches: Iterable[pa.RecordBatch], directory: Path) -> int:
    """Write a table; return the number of its rows."""
    return tables.write_rows(batches, directory / TABLE, SCHEMA)


def read_table(path: Path, n_items: int) -> sparse.csr_matrix:
    """Read a table as a sparse matrix, (N, N)."""
    table = tables.read_columns(path)
    rows, columns, scores = (table[name].to_numpy() for name in ("item_row", "neighbour_row", "score"))
    return sparse.csr_matrix((scores, (rows, columns)), (n_items, n_items))
