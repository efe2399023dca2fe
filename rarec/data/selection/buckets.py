"""Buckets of samples by the length of the user's history and the item's popularity, and an even draw from them.

Shape letters: S samples, U users, N items, V values, G buckets of the grid.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.config.schema import Shards
from rarec.data.dataset import Int32, Int64, PreparedDataset

Mask = npt.NDArray[np.bool_]
MOST = 10**9
"""Size of the largest group for which numpy draws a hypergeometric number."""


@dataclass(frozen=True)
class Buckets:
    """Values sorted into buckets.

    Attributes:
        of_V: bucket of each value.
        ranges: smallest and largest value of each bucket; None if it is empty.
    """

    of_V: Int64
    ranges: list[tuple[int, int] | None]

    @classmethod
    def equal_frequency(cls, values_V: npt.NDArray[np.integer], count: int) -> "Buckets":
        """Cut values into buckets of equal size; equal values share a bucket, so some may be empty."""
        ordered = np.sort(values_V)
        edges = ordered[np.arange(1, count) * len(ordered) // count]
        of_V = np.searchsorted(edges, values_V, side="right").astype(np.int64)
        inside = [values_V[of_V == bucket] for bucket in range(count)]
        return cls(of_V, [(int(part.min()), int(part.max())) if len(part) else None for part in inside])


@dataclass(frozen=True)
class Grid:
    """Equal-frequency buckets of users by training length and of items by training popularity (our choice).

    Only users with a sample and items that occur in training are counted.
    """

    lengths: Buckets
    popularity: Buckets
    users_U: Int64
    items_N: Int64

    @classmethod
    def of(cls, dataset: PreparedDataset, config: Shards) -> "Grid":
        """Sort users with a sample, and items that occur in training, into as many buckets as configured."""
        users, items = dataset.train_length_U > 1, dataset.train_counts_N > 0
        lengths = Buckets.equal_frequency(dataset.train_length_U[users], config.length_buckets)
        popularity = Buckets.equal_frequency(dataset.train_counts_N[items], config.popularity_buckets)
        return cls(lengths, popularity, _spread(lengths.of_V, users), _spread(popularity.of_V, items))

    def bucket(self, users_S: Int32, items_S: Int32) -> Int64:
        """Return the bucket of each sample."""
        buckets_S: Int64 = self.users_U[users_S] * len(self.popularity.ranges) + self.items_N[items_S]
        return buckets_S

    @property
    def size(self) -> int:
        """Return the number of buckets, G."""
        return len(self.lengths.ranges) * len(self.popularity.ranges)

    def report(self, **counts_G: Int64) -> list[dict[str, Any]]:
        """Return one row for each bucket with a sample: its ranges, and the number of samples of each kind."""
        columns = len(self.popularity.ranges)
        return [
            {
                "history_length": self.lengths.ranges[place // columns],
                "popularity": self.popularity.ranges[place % columns],
                **{name: int(count_G[place]) for name, count_G in counts_G.items()},
            }
            for place in range(self.size)
            if any(count_G[place] for count_G in counts_G.values())
        ]


def _spread(buckets: Int64, where: Mask) -> Int64:
    """Scatter buckets back to the rows selected by `where`; -1 elsewhere."""
    rows = np.full(len(where), -1)
    rows[where] = buckets
    return rows


def even_shares(counts_G: Int64, wanted: int, rng: np.random.Generator) -> Int64:
    """Return how many samples to draw from each bucket: one from each in turn, until there are enough.

    An exhausted bucket is passed over. Which buckets come first in the last round is random.

    Args:
        counts_G: samples in each bucket.
        wanted: number of samples to draw; all if there are fewer.
        rng: random generator of the last round.
    """
    turns = range(int(counts_G.max()) + 1)
    full = bisect_right(turns, wanted, key=lambda turn: int(np.minimum(counts_G, turn).sum())) - 1
    shares_G: Int64 = np.minimum(counts_G, full)
    not_exhausted = rng.permutation(np.flatnonzero(counts_G > full))
    shares_G[not_exhausted[: wanted - int(shares_G.sum())]] += 1
    return shares_G


class GroupSampler:
    """Draws from groups of samples without replacement while they pass by in blocks; memory is that of a block.

    How many of a block are drawn is hypergeometric, so that every sample of a group has the same chance.

    Args:
        counts_G: samples in each group.
        shares_G: samples to draw from each.
        rng: random generator.
    """

    def __init__(self, counts_G: Int64, shares_G: Int64, rng: np.random.Generator) -> None:
        self._left_G, self._wanted_G, self._rng = counts_G.copy(), np.minimum(shares_G, counts_G), rng

    def draw(self, groups_S: Int64) -> Int64:
        """Return which samples of the next block are drawn, in their order; those of group -1 never are."""
        drawn = [np.empty(0, np.int64)]
        for group in np.unique(groups_S[groups_S >= 0]):
            at = np.flatnonzero(groups_S == group)
            left, wanted = int(self._left_G[group]), int(self._wanted_G[group])
            all_of_them = wanted in (0, left)
            take = min(wanted, len(at)) if all_of_them else self._number(len(at), left, wanted)
            drawn.append(at if take == len(at) else self._rng.choice(at, take, replace=False))
            self._left_G[group] -= len(at)
            self._wanted_G[group] -= take
        return np.sort(np.concatenate(drawn))

    def _number(self, here: int, left: int, wanted: int) -> int:
        """Draw how many of the `wanted` samples of all that are `left` are among those here."""
        if left <= MOST:
            return int(self._rng.hypergeometric(here, left - here, wanted))
        number = int(self._rng.binomial(here, wanted / left))  # of a group so large, it differs by next to nothing
        return min(max(number, wanted - (left - here)), wanted)
