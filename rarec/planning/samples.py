"""What the shards of a run say of its samples: how many, how long their prompts are, what batches they make.

Shape letters: S samples, b of one batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rarec.planning.lengths import Prompts


@dataclass(frozen=True)
class Batches:
    """The batches of an epoch.

    Attributes:
        count: how many; None where that is not known.
        samples: of one, on average.
        smallest: samples of the smallest.
        largest: samples and longest user prompt of those that may take most memory: the one of most samples first, the
            one of the longest prompts last.
    """

    count: int | None
    samples: float
    smallest: int
    largest: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, batches: Iterable[npt.NDArray[np.integer]]) -> "Batches":
        """From the lengths of each one's user prompts."""
        shapes = [(len(tokens_b), int(tokens_b.max())) for tokens_b in batches]
        sizes = [size for size, _ in shapes]
        largest = max(shapes), max(shapes, key=lambda shape: shape[::-1])
        return cls(len(shapes), sum(sizes) / len(shapes), min(sizes), tuple(dict.fromkeys(largest)))


@dataclass(frozen=True)
class Samples:
    """What the selected samples are.

    Attributes:
        count: of an epoch.
        users: their prompts' lengths.
        batches: that they make under a token budget; None where batches are counted in samples.
    """

    count: int
    users: Prompts
    batches: Batches | None = None

    @classmethod
    def of(cls, tokens_S: npt.NDArray[np.integer], batches: Batches | None = None) -> "Samples":
        """From the lengths of their user prompts, as an index of shards has them."""
        return cls(len(tokens_S), Prompts(int(tokens_S.max()), float(tokens_S.mean())), batches)
