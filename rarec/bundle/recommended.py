"""What a recommender is asked, and what it returns."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd

Id = str | int
History = Sequence[Id]
"""Ids of items, oldest first."""


@dataclass(frozen=True)
class Request:
    """What one user asks for; see `Recommender.recommend`."""

    history: History
    k: int = 10
    exclude_seen: bool = True
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
        rank: 1 is the best of all items that the user has not seen.
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
