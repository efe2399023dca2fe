"""The items that are ranked, what a recommender is asked, and what it returns. Needs no torch.

Shape letters: B users, K items returned, N catalogue.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rarec.bundle.conditions import KINDS

if TYPE_CHECKING:
    import pandas as pd

Id = str | int
History = Sequence[Id]
"""Ids of items, oldest first."""
Rows = npt.NDArray[np.int64]
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


@dataclass(frozen=True)
class Request:
    """What one user asks for; see `Recommender.recommend`."""

    history: History
    k: int = 10
    exclude_seen: bool | None = None
    allow: Collection[Id] | None = None
    deny: Collection[Id] = ()
    where: str | None = None
    diversify: float = 0.0
    fallback: str = "popularity"


class Recommended(NamedTuple):
    """One item of a list."""

    item: Id
    title: str
    score: float


@dataclass(frozen=True)
class Recommendations:
    """The best items of B users, best first.

    Attributes:
        items: B lists of at most K items.
        unknown: for each user, the number of ids in the history that are not in the catalogue; they were skipped.
        unknown_in_rules: for each user, the ids in `allow` and `deny` that are not in the catalogue; they were skipped.
    """

    items: list[list[Recommended]]
    unknown: list[int]
    unknown_in_rules: list[list[Id]] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[Recommended]]:
        """Return an iterator over the users' lists."""
        return iter(self.items)

    def __len__(self) -> int:
        """Return B."""
        return len(self.items)

    def __getitem__(self, user: int) -> list[Recommended]:
        """Return one user's list."""
        return self.items[user]

    def to_arrow(self) -> pa.Table:
        """Return a row for each item: `user` (its place in the histories), `rank` from 1, `item`, `title`, `score`."""
        rows = [(user, rank, *item) for user, items in enumerate(self.items) for rank, item in enumerate(items, 1)]
        names = ("user", "rank", "item", "title", "score")
        return pa.table({name: [row[column] for row in rows] for column, name in enumerate(names)})

    def to_pandas(self) -> "pd.DataFrame":
        """Return `to_arrow` as a DataFrame."""
        return self.to_arrow().to_pandas()


@dataclass(frozen=True)
class Explanation:
    """The evidence for an item after a history.

    Attributes:
        item: its id.
        title: its title.
        parts: what each part of the recommender adds to its score, compared with the average item; by the part's title.
        nearest: the items of the history that are most like it, with the cosine of their vectors.
    """

    item: Id
    title: str
    parts: dict[str, float]
    nearest: list[Recommended]


@dataclass(frozen=True)
class Place:
    """The place of a new item in a user's ranking.

    Attributes:
        rank: 1 is the best of all items that may be returned.
        of: number of these items, the new one included.
        score: of the new item.
        above: the items right above it, best first.
        below: those right below it.
    """

    rank: int
    of: int
    score: float
    above: list[Recommended]
    below: list[Recommended]
