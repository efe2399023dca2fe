"""The plan: which samples make which batch, in every epoch. It needs two columns of the index, and opens no file.

The order is a function of seed and epoch, and a place in it is a number, the step; so a run goes on anywhere, and
global batches are the same whatever reads them. Shards come in random order and are mixed in groups; samples are sorted
by length in windows, so that little of a batch is padding, and a window's batches come in random order. Groups and
windows have generators of their own: any window is planned without those before it, and only one is held.

Shape letters: S samples, P shards, W windows, n samples of one window.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rarec.data.shards.index import REPAIR, release_pages
from rarec.errors import UserError

Numbers = npt.NDArray[np.int64]
Column = npt.NDArray[np.integer]
SHUFFLED_TOGETHER = 4
"""Shards whose samples are mixed."""
SORTED_TOGETHER = 16
"""Batches of a window."""
_LENGTHS_AT_ONCE = 2**20
"""Samples whose lengths are looked at together."""
_SHARDS, _GROUP, _WINDOW = 1, 2, 3
"""Tell generators apart; none is 0, for NumPy takes [1, 2] and [1, 2, 0] for the same seed."""


class BatchPlan:
    """Batches of sample numbers (rows of the index), planned as they are asked for.

    Args:
        shard_S: each sample's shard, ascending; may be memory-mapped.
        tokens_S: of each sample's user prompt; may be memory-mapped.
        seed: of every order.
        batch_size: the largest batch; sizes differ by at most one, none is a small remainder.
        tokens_per_batch: instead of it, a budget: samples in a batch times its longest prompt is at most this.
        slots: positions that every prompt has beside its text; the budget counts them.
        excluded: numbers of samples that no batch takes.

    Raises:
        UserError: no sample is left, or a single prompt is longer than the budget.
    """

    def __init__(
        self,
        shard_S: Column,
        tokens_S: Column,
        seed: int,
        *,
        batch_size: int = 64,
        tokens_per_batch: int | None = None,
        slots: int = 0,
        excluded: Iterable[int] = (),
    ) -> None:
        self._tokens_S, self.seed = tokens_S, seed
        self._shards = _KeptSamples(np.asarray(shard_S), np.unique(np.fromiter(excluded, np.int64)))
        self.samples = int(self._shards.counts_P.sum())
        if not self.samples:
            raise UserError(f"none of {len(shard_S)} samples is left to train on", REPAIR)
        self._batching: _Batching = (
            _TokenBudget(self.samples, tokens_S, tokens_per_batch, slots)
            if tokens_per_batch
            else _FixedSize(self.samples, batch_size)
        )
        self._surveys: dict[int, tuple[Numbers, int]] = {}

    def steps(self, epoch: int) -> int:
        """Batches of an epoch; with a token budget they are counted by planning it once."""
        return int(self._survey(epoch)[0][-1])

    def total_steps(self, epochs: int) -> int:
        """Steps of so many epochs."""
        return sum(self.steps(epoch) for epoch in range(epochs))

    def epoch_and_step(self, step: int) -> tuple[int, int]:
        """The epoch of a step counted over all epochs, and the step in it."""
        epoch = 0
        while step and step >= self.steps(epoch):
            step, epoch = step - self.steps(epoch), epoch + 1
        return epoch, step

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Numbers]:
        """The epoch's batches from `first_step` on."""
        ends_W, _ = self._survey(epoch)
        first = int(np.searchsorted(ends_W, first_step, side="right"))
        skipped = first_step - int(ends_W[first - 1] if first else 0)
        for window, (numbers_n, tokens_n) in enumerate(self._windows(epoch, first), first):
            batches = np.split(numbers_n, np.cumsum(self._batching.sizes(window, tokens_n))[:-1])
            mixed = np.random.default_rng([self.seed, epoch, _WINDOW, window]).permutation(len(batches))
            yield from (batches[at] for at in mixed[skipped:])
            skipped = 0

    def batches_between(self, first: int, last: int) -> Iterator[Numbers]:
        """The batches of steps `first` to `last`, the last not included, over all epochs."""
        begun, step = self.epoch_and_step(first)
        every = (self.batches(epoch, step if epoch == begun else 0) for epoch in count(begun))
        return islice(chain.from_iterable(every), last - first)

    def first_samples(self, most: int) -> Numbers:
        """So many of the first epoch's samples, at most: the first of its order, before batches are made by length."""
        return _EpochOrder(self._shards, self.seed, 0).between(0, min(most, self.samples))

    def share(self, batch: Numbers, rank: int, world: int) -> Numbers:
        """What one of `world` ranks takes of a batch; together they take all of it."""
        return batch[rank::world]

    def check_world_size(self, world: int, epochs: int) -> None:
        """Refuse more ranks than the smallest batch has samples.

        Raises:
            UserError: some rank would have nothing to do in some step.
        """
        smallest = min(self._survey(epoch)[1] for epoch in range(epochs))
        if smallest < world:
            problem = f"the smallest batch, of {smallest}, is too small for {world} ranks"
            raise UserError(problem, "raise train.batch_size or train.tokens_per_batch, or start fewer ranks")

    def _survey(self, epoch: int) -> tuple[Numbers, int]:
        """Of an epoch: how many steps there are up to the end of each window (W), and the smallest batch."""
        if epoch not in self._surveys:
            counts_W, smallest = self._batching.survey(tokens_n for _, tokens_n in self._windows(epoch))
            self._surveys[epoch] = np.cumsum(counts_W), smallest
        return self._surveys[epoch]

    def _windows(self, epoch: int, first: int = 0) -> Iterator[tuple[Numbers, Column]]:
        """Each window from `first` on: its samples and the lengths of their prompts, the shortest first."""
        order = _EpochOrder(self._shards, self.seed, epoch)
        for window in range(first, self._batching.windows):
            numbers_n = order.between(self._batching.edge(window), self._batching.edge(window + 1))
            tokens_n = self._tokens_S[numbers_n]
            release_pages(self._tokens_S)
            by_length = np.argsort(tokens_n, kind="stable")
            yield numbers_n[by_length], tokens_n[by_length]


class _KeptSamples:
    """Which samples of each shard are kept."""

    def __init__(self, shard_S: Column, excluded: Numbers) -> None:
        shards = int(shard_S[-1]) + 1 if len(shard_S) else 0
        edges = [bisect_left(shard_S, shard) for shard in range(shards)]
        self._edges, self._excluded = np.array([*edges, len(shard_S)]), excluded
        self.counts_P: Numbers = np.diff(self._edges) - np.diff(np.searchsorted(excluded, self._edges))

    def kept(self, shard: int) -> Numbers:
        """The numbers of a shard's samples but the excluded ones."""
        start, stop = self._edges[shard : shard + 2]
        without = self._excluded[slice(*np.searchsorted(self._excluded, [start, stop]))]
        return np.delete(np.arange(start, stop), without - start)


class _EpochOrder:
    """One epoch's samples in their order; a group of shards is mixed when it is asked for."""

    def __init__(self, shards: _KeptSamples, seed: int, epoch: int) -> None:
        self._shards, self._key = shards, (seed, epoch)
        self._order_P = np.random.default_rng([seed, epoch, _SHARDS]).permutation(len(shards.counts_P))
        starts = np.arange(0, len(self._order_P), SHUFFLED_TOGETHER)
        self._ends = np.cumsum(np.add.reduceat(shards.counts_P[self._order_P], starts))
        self._held: dict[int, Numbers] = {}

    def between(self, start: int, stop: int) -> Numbers:
        """The samples at these places of the order; memory holds the groups that they are in."""
        first, last = int(np.searchsorted(self._ends, start, side="right")), int(np.searchsorted(self._ends, stop))
        groups = {at: self._held[at] if at in self._held else self._group(at) for at in range(first, last + 1)}
        self._held = {last: groups[last]}
        before = int(self._ends[first - 1]) if first else 0
        return np.concatenate(list(groups.values()))[start - before : stop - before]

    def _group(self, at: int) -> Numbers:
        shards = self._order_P[at * SHUFFLED_TOGETHER : (at + 1) * SHUFFLED_TOGETHER]
        numbers = np.concatenate([self._shards.kept(int(shard)) for shard in shards])
        return np.random.default_rng([*self._key, _GROUP, at]).permutation(numbers)


class _Batching(Protocol):
    """How the order is cut into windows, and a window into batches."""

    windows: int

    def edge(self, window: int) -> int:
        """Where a window begins in the order."""

    def sizes(self, window: int, tokens_n: Column) -> Numbers:
        """Of a window's batches, given the lengths of its prompts, the shortest first."""

    def survey(self, windows: Iterable[Column]) -> tuple[Numbers, int]:
        """How many batches each window has (W), and the size of the smallest, given each window's lengths."""


class _FixedSize:
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


class _TokenBudget:
    """Batches as large as a budget of padded tokens allows."""

    def __init__(self, samples: int, tokens_S: Column, budget: int, slots: int) -> None:
        self._samples, self._budget, self._slots = samples, budget, slots
        parts = [tokens_S[at : at + _LENGTHS_AT_ONCE] for at in range(0, len(tokens_S), _LENGTHS_AT_ONCE)]
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
        """_Batching from the longest prompt down; the last two batches share evenly, so that none is a small remainder."""
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
