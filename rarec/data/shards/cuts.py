"""How an epoch's order is cut into windows, and a window, sorted by length, into batches.

Shape letters: S samples, W windows, n samples of one window.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rarec.errors import UserError

Numbers = npt.NDArray[np.int64]
Column = npt.NDArray[np.integer]

SORTED_TOGETHER = 16
"""Batches of a window."""
_AT_ONCE = 2**20
"""Samples whose lengths are looked at together."""


class Cut(Protocol):
    """How the order is cut into windows, and a window into batches."""

    windows: int

    def edge(self, window: int) -> int:
        """Where a window begins in the order."""

    def sizes(self, window: int, tokens_n: Column) -> Numbers:
        """Of a window's batches, given the lengths of its prompts, the shortest first."""

    def survey(self, windows: Iterable[Column]) -> tuple[Numbers, int]:
        """How many batches each window has (W), and the size of the smallest, given each window's lengths."""


class BySize:
    """Batches whose sizes differ by at most one."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self._steps = -(-samples // batch_size)
        self._small, self._larger = divmod(samples, self._steps)
        self.windows = -(-self._steps // SORTED_TOGETHER)

    def edge(self, window: int) -> int:
        """Where a window begins in the order."""
        step = min(window * SORTED_TOGETHER, self._steps)
        return step * self._small + min(step, self._larger)

    def sizes(self, window: int, tokens_n: Column) -> Numbers:
        """Known without the lengths."""
        steps = np.arange(window * SORTED_TOGETHER, min((window + 1) * SORTED_TOGETHER, self._steps))
        return self._small + (steps < self._larger)

    def survey(self, windows: Iterable[Column]) -> tuple[Numbers, int]:
        """Known without the lengths: no window is planned for it."""
        ends_W = np.minimum(np.arange(1, self.windows + 1) * SORTED_TOGETHER, self._steps)
        return np.diff(ends_W, prepend=0), self._small


class ByTokens:
    """Batches as large as a budget of padded tokens allows."""

    def __init__(self, samples: int, tokens_S: Column, budget: int, slots: int) -> None:
        self._samples, self._budget, self._slots = samples, budget, slots
        parts = [tokens_S[at : at + _AT_ONCE] for at in range(0, len(tokens_S), _AT_ONCE)]
        longest = max(int(part.max()) for part in parts) + slots
        if longest > budget:
            problem = f"the longest user prompt has {longest} tokens, more than train.tokens_per_batch = {budget}"
            raise UserError(problem, "raise train.tokens_per_batch, or cut prompts with prompt.max_tokens")
        mean = sum(int(part.sum(dtype=np.int64)) for part in parts) / len(tokens_S) + slots
        self.windows = -(-samples // (SORTED_TOGETHER * max(1, int(budget / mean))))

    def edge(self, window: int) -> int:
        """Where a window begins in the order."""
        return self._samples * window // self.windows

    def sizes(self, window: int, tokens_n: Column) -> Numbers:
        """Cut from the longest prompt down; the last two batches share evenly, so that none is a small remainder."""
        sizes, left = [], len(tokens_n)
        while left:
            sizes.append(min(left, self._budget // max(1, int(tokens_n[left - 1]) + self._slots)))
            left -= sizes[-1]
        if len(sizes) > 1 and sizes[-1] < sizes[-2]:
            rest = sizes[-2] + sizes[-1]
            sizes[-2:] = [rest - rest // 2, rest // 2]
        return np.array(sizes[::-1])

    def survey(self, windows: Iterable[Column]) -> tuple[Numbers, int]:
        """How many batches each window has (W), and the size of the smallest."""
        sizes = [self.sizes(window, tokens_n) for window, tokens_n in enumerate(windows)]
        return np.array([len(part) for part in sizes]), min(int(part.min()) for part in sizes)
