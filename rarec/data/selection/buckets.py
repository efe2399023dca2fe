"""Equal-frequency buckets, and a draw that is even over them.

Shape letters: V values, S samples.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Buckets:
    """Numbers sorted into buckets.

    Attributes:
        of_V: each number's bucket.
        ranges: smallest and largest number of each bucket; None where no number fell.
    """

    of_V: Int64
    ranges: list[tuple[int, int] | None]

    @classmethod
    def equal_frequency(cls, values_V: npt.NDArray[np.integer], count: int) -> "Buckets":
        """Cut into buckets of equally many numbers; equal numbers share a bucket, so some may stay empty."""
        ordered = np.sort(values_V)
        edges = ordered[np.arange(1, count) * len(ordered) // count]
        of_V = np.searchsorted(edges, values_V, side="right").astype(np.int64)
        inside = [values_V[of_V == bucket] for bucket in range(count)]
        return cls(of_V, [(int(part.min()), int(part.max())) if len(part) else None for part in inside])


def draw_evenly(buckets_S: Int64, wanted: int, rng: np.random.Generator) -> Int64:
    """Draw without replacement, one from each bucket in turn; a bucket that is exhausted gives way to the others.

    Which sample of a bucket is drawn, and which buckets come first in the last round, is random.

    Args:
        buckets_S: each sample's bucket.
        wanted: how many; all where there are no more.
        rng: of the draw.

    Returns:
        Places in `buckets_S`.
    """
    shuffled = rng.permutation(len(buckets_S))
    by_bucket = shuffled[np.argsort(buckets_S[shuffled], kind="stable")]
    _, starts, counts = np.unique(buckets_S[by_bucket], return_index=True, return_counts=True)
    round_S = np.arange(len(by_bucket)) - np.repeat(starts, counts)
    turns = np.lexsort((rng.random(len(by_bucket)), round_S))
    drawn: Int64 = by_bucket[turns[:wanted]]
    return drawn
