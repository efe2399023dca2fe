"""The items that are ranked, and their table. Needs no torch. Shape letter: N catalogue."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rarec.bundle.conditions import KINDS

COLUMNS = ("item_id", "title", "text", "train_count")
"""Of `items.parquet`."""
_IDS = (pa.int64(), pa.string())


@dataclass(frozen=True)
class Catalogue:
    """The items that are ranked.

    Attributes:
        ids: (N,) int64 or string, as in the log.
        titles: (N,).
        texts: (N,), "" where there is none.
        counts_N: number of training interactions.
        columns: that rules may name, (N,) each, of a type in `KINDS`, by name.
    """

    ids: pa.Array
    titles: list[str]
    texts: list[str]
    counts_N: npt.NDArray[np.int64]
    columns: Mapping[str, pa.Array] = field(default_factory=dict)

    @property
    def table(self) -> pa.Table:
        """The rows of `items.parquet`."""
        columns = (self.ids, self.titles, self.texts, self.counts_N)
        return pa.table({**dict(zip(COLUMNS, columns, strict=True)), **self.columns})

    @classmethod
    def of(cls, table: pa.Table) -> "Catalogue":
        """Return the items of a table as `table` gives it."""
        ids, titles, texts, counts = (table[name] for name in COLUMNS)
        columns = {name: table[name].combine_chunks() for name in table.column_names if name not in COLUMNS}
        return cls(ids.combine_chunks(), titles.to_pylist(), texts.to_pylist(), counts.to_numpy(), columns)

    def write(self, path: Path) -> None:
        """Write it as Parquet."""
        pq.write_table(self.table, path, compression="zstd")

    @classmethod
    def read(cls, data: bytes) -> "Catalogue":
        """Read it.

        Raises:
            ValueError: it lacks a column, or has one of another type, a missing value, or an id twice.
        """
        table = pq.read_table(pa.BufferReader(data))
        table.validate(full=True)  # text that is none
        for name in COLUMNS:
            if table[name].null_count:
                raise ValueError("a value is missing")
        ids, *texts, counts = (table[name].type for name in COLUMNS)
        others = {table.schema.field(name).type for name in table.column_names if name not in COLUMNS}
        fit = ids in _IDS and texts == [pa.string(), pa.string()] and counts == pa.int64()
        if not (fit and others <= KINDS.keys()):
            raise ValueError(f"its columns are of the types {', '.join(map(str, table.schema.types))}")
        if not len(table) or len(pc.unique(table["item_id"])) < len(table):
            raise ValueError("an item id is there twice, or there is no item")
        if pc.min(table["train_count"]).as_py() < 0:
            raise ValueError("a number of interactions is negative")
        return cls.of(table)
