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
    columns = {"item_row": np.full(len(best), item), "neighbour_row": best, "score": scores_N[best]}
    return pa.RecordBatch.from_pydict(columns)


def write_table(batches: Iterable[pa.RecordBatch], directory: Path) -> int:
    """Write a table; return the number of its rows."""
    return tables.write_rows(batches, directory / TABLE, SCHEMA)


def read_table(directory: Path, n_items: int) -> sparse.csr_matrix:
    """Read a table as a sparse matrix, (N, N)."""
    table = tables.read_columns(directory / TABLE)
    rows, columns, scores = (table[name].to_numpy() for name in ("item_row", "neighbour_row", "score"))
    return sparse.csr_matrix((scores, (rows, columns)), (n_items, n_items))
