"""Plan the batches of every epoch from columns of the index, without opening a tar.

The order is a function of seed and epoch, and a position in it is one number, the step: a run can resume anywhere, and
global batches do not depend on the number of readers. Shards are shuffled and mixed in groups; samples are sorted by
length within windows, which reduces padding, and the batches of a window are shuffled. Groups and windows have random
generators of their own, so any window can be planned alone, and only one is kept in memory.

Shape letters: S samples, P shards, W windows, n samples of one window.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice, pairwise

import numpy as np
import numpy.typing as npt

from rarec.config.schema import RunConfig, Train
from rarec.data.shards.samples import REPAIR, IndexRows, fold_of
from rarec.data.tables import release_pages
from rarec.errors import UserError

Numbers = npt.NDArray[np.int64]
Column = npt.NDArray[np.integer]
SHUFFLED_TOGETHER = 4
"""Number of shards whose samples are mixed."""
SORTED_TOGETHER = 16
"""Number of batches in a window."""
_SHARDS, _GROUP, _WINDOW, _TURNS = 1, 2, 3, 4
"""Stream ids of the random generators; never 0, because NumPy treats [1, 2] and [1, 2, 0] as the same seed."""


class BatchPlan(ABC):
    """Plan batches of sample numbers (rows of the index) on demand.

    Attributes:
        samples: number of samples of an epoch.
    """

    samples: int

    @abstractmethod
    def steps(self, epoch: int) -> int:
        """Return the number of batches of an epoch; with a token budget, plan the epoch once to count them."""

    @abstractmethod
    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Numbers]:
        """Yield the batches of an epoch from `first_step` on."""

    @abstractmethod
    def first_samples(self, most: int) -> Numbers:
        """Return up to `most` samples of the first epoch, in the order before batches are formed by length."""

    @abstractmethod
    def smallest(self, epoch: int) -> int:
        """Return the size of the smallest batch of an epoch."""

    def total_steps(self, epochs: int) -> int:
        """Return the number of steps of `epochs` epochs."""
        return sum(self.steps(epoch) for epoch in range(epochs))

    def epoch_and_step(self, step: int) -> tuple[int, int]:
        """Convert a global step to its epoch and the step within it."""
        epoch = 0
        while step and step >= self.steps(epoch):
            step, epoch = step - self.steps(epoch), epoch + 1
        return epoch, step

    def batches_between(self, first: int, last: int) -> Iterator[Numbers]:
        """Yield the batches of the global steps `first` to `last` (exclusive)."""
        begun, step = self.epoch_and_step(first)
        every = (self.batches(epoch, step if epoch == begun else 0) for epoch in count(begun))
        return islice(chain.from_iterable(every), last - first)

    def share(self, batch: Numbers, rank: int, world: int) -> Numbers:
        """Return one rank's part of a batch; the ranks' parts together are the batch."""
        return batch[rank::world]

    def check_world_size(self, world: int, epochs: int) -> None:
        """Check that the smallest batch has a sample for every rank.

        Raises:
            UserError: some rank would have no sample in some step.
        """
        smallest = min(self.smallest(epoch) for epoch in range(epochs))
        if smallest < world:
            problem = f"the smallest batch, of {smallest}, is smaller than the number of ranks, {world}"
            raise UserError(problem, "raise train.batch_size or train.tokens_per_batch, or start fewer processes")


def plan_batches(index_S: IndexRows, config: RunConfig, slots: int, excluded: Iterable[int] = ()) -> BatchPlan:
    """Plan the batches of a run's samples, each of one part of the users (`ids.folds`).

    Args:
        index_S: of the shards; the samples of one part of the users are behind those of the part before.
        config: of the run.
        slots: see `ShardPlan`.
        excluded: see `ShardPlan`.

    Raises:
        UserError: see `ShardPlan`.
    """
    folds, seed, train = len(config.ids.for_samples), config.run.seed, config.train
    excluded_n = np.unique(np.fromiter(excluded, np.int64))
    users_S = index_S["user"]
    edges = [bisect_left(users_S, fold, key=lambda user: fold_of(user, folds)) for fold in range(folds)]
    plans = []
    for start, stop in pairwise([*edges, len(users_S)]):
        own_n = excluded_n[slice(*np.searchsorted(excluded_n, [start, stop]))] - start
        if folds == 1 or stop - start > len(own_n):
            part_S = index_S[start:stop]
            plans.append((start, ShardPlan(part_S["shard"], part_S["tokens"], seed, train, slots, own_n)))
    if not plans:
        raise UserError(f"none of {len(users_S)} samples is left for training", REPAIR)
    return plans[0][1] if len(plans) == 1 else FoldedPlan(plans, seed)


class FoldedPlan(BatchPlan):
    """Take the batches of several plans in random turns, so that each batch is of one part of the users.

    Args:
        plans: for each part, the number of its first sample, and the plan of its samples.
        seed: of the turns.
    """

    def __init__(self, plans: Sequence[tuple[int, BatchPlan]], seed: int) -> None:
        self._plans, self._seed = plans, seed
        self.samples = sum(plan.samples for _, plan in plans)

    def steps(self, epoch: int) -> int:
        """See `BatchPlan`."""
        return sum(plan.steps(epoch) for _, plan in self._plans)

    def smallest(self, epoch: int) -> int:
        """See `BatchPlan`."""
        return min(plan.smallest(epoch) for _, plan in self._plans)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Numbers]:
        """See `BatchPlan`."""
        turns = np.repeat(np.arange(len(self._plans)), [plan.steps(epoch) for _, plan in self._plans])
        turns = np.random.default_rng([self._seed, epoch, _TURNS]).permutation(turns)
        done = np.bincount(turns[:first_step], minlength=len(self._plans)).tolist()
        batches = [plan.batches(epoch, step) for (_, plan), step in zip(self._plans, done, strict=True)]
        return (self._plans[turn][0] + next(batches[turn]) for turn in turns[first_step:])

    def first_samples(self, most: int) -> Numbers:
        """See `BatchPlan`: as many of each part, as far as it has them."""
        each = -(-most // len(self._plans))
        return np.concatenate([first + plan.first_samples(each) for first, plan in self._plans])[:most]


class ShardPlan(BatchPlan):
    """Plan the batches of samples that are mixed with each other.

    Args:
        shard_S: shard of each sample, ascending; may be memory-mapped.
        tokens_S: number of text tokens of each user prompt; may be memory-mapped.
        seed: seed of every order.
        train: the section `train`. `batch_size` is the largest size; sizes differ by at most one, so there is no small
            last batch. With `tokens_per_batch` instead, batch size times longest prompt is at most this.
        slots: soft-prompt positions that every prompt has besides its text; a budget of tokens includes them.
        excluded: sample numbers that no batch contains.

    Raises:
        UserError: no sample is left, or a single prompt exceeds the budget.
    """

    def __init__(
        self, shard_S: Column, tokens_S: Column, seed: int, train: Train, slots: int = 0, excluded: Iterable[int] = ()
    ) -> None:
        self._tokens_S, self.seed = tokens_S, seed
        self._shards = _KeptSamples(np.asarray(shard_S), np.unique(np.fromiter(excluded, np.int64)))
        self.samples = int(self._shards.counts_P.sum())
        if not self.samples:
            raise UserError(f"none of {len(shard_S)} samples is left for training", REPAIR)
        self._batching: _FixedSize | _TokenBudget = _FixedSize(self.samples, train.batch_size)
        if train.tokens_per_batch:
            self._batching = _TokenBudget(self.samples, tokens_S, train.tokens_per_batch, slots)
        self._surveys: dict[int, tuple[Numbers, int]] = {}

    def steps(self, epoch: int) -> int:
        """See `BatchPlan`."""
        return int(self._survey(epoch)[0][-1])

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Numbers]:
        """See `BatchPlan`."""
        ends_W, _ = self._survey(epoch)
        first = int(np.searchsorted(ends_W, first_step, side="right"))
        skipped = first_step - int(ends_W[first - 1] if first else 0)
        for window, (numbers_n, tokens_n) in enumerate(self._windows(epoch, first), first):
            batches = np.split(numbers_n, np.cumsum(self._batching.sizes(window, tokens_n))[:-1])
            mixed = np.random.default_rng([self.seed, epoch, _WINDOW, window]).permutation(len(batches))
            yield from (batches[number] for number in mixed[skipped:])
            skipped = 0

    def first_samples(self, most: int) -> Numbers:
        """See `BatchPlan`."""
        return _EpochOrder(self._shards, self.seed, 0).between(0, min(most, self.samples))

    def smallest(self, epoch: int) -> int:
        """See `BatchPlan`."""
        return self._survey(epoch)[1]

    def _survey(self, epoch: int) -> tuple[Numbers, int]:
        """Return the cumulative number of steps after each window (W), and the size of the smallest batch."""
        if epoch not in self._surveys:
            self._surveys[epoch] = self._batching.survey(tokens_n for _, tokens_n in self._windows(epoch))
        return self._surveys[epoch]

    def _windows(self, epoch: int, first: int = 0) -> Iterator[tuple[Numbers, Column]]:
        """Yield the samples of each window from `first` on and the lengths of their prompts, shortest first."""
        order = _EpochOrder(self._shards, self.seed, epoch)
        for start, stop in pairwise(self._batching.edges[first:].tolist()):
            numbers_n = order.between(start, stop)
            tokens_n = self._tokens_S[numbers_n]
            release_pages(self._tokens_S)
            by_length = np.argsort(tokens_n, kind="stable")
            yield numbers_n[by_length], tokens_n[by_length]


class _KeptSamples:
    """The samples of each shard without the excluded ones; shards are numbered from the first that there is."""

    def __init__(self, shard_S: Column, excluded: Numbers) -> None:
        shards = range(int(shard_S[0]), int(shard_S[-1]) + 1) if len(shard_S) else range(0)
        edges = [bisect_left(shard_S, shard) for shard in shards]
        self._edges, self._excluded = np.array([*edges, len(shard_S)]), excluded
        self.counts_P: Numbers = np.diff(self._edges) - np.diff(np.searchsorted(excluded, self._edges))

    def kept(self, shard: int) -> Numbers:
        """Return the numbers of a shard's samples without the excluded ones."""
        start, stop = self._edges[shard : shard + 2]
        without = self._excluded[slice(*np.searchsorted(self._excluded, [start, stop]))]
        return np.delete(np.arange(start, stop), without - start)


class _EpochOrder:
    """The order of the samples of one epoch; a group of shards is shuffled on demand."""

    def __init__(self, shards: _KeptSamples, seed: int, epoch: int) -> None:
        self._shards, self._key = shards, (seed, epoch)
        self._order_P = np.random.default_rng([seed, epoch, _SHARDS]).permutation(len(shards.counts_P))
        starts = np.arange(0, len(self._order_P), SHUFFLED_TOGETHER)
        self._ends = np.cumsum(np.add.reduceat(shards.counts_P[self._order_P], starts))
        self._held: dict[int, Numbers] = {}

    def between(self, start: int, stop: int) -> Numbers:
        """Return the samples at these positions of the order; only the last group is kept in memory."""
        first, last = int(np.searchsorted(self._ends, start, side="right")), int(np.searchsorted(self._ends, stop))
        groups = [self._held[group] if group in self._held else self._group(group) for group in range(first, last + 1)]
        self._held = {last: groups[-1]}
        before = int(self._ends[first - 1]) if first else 0
        return np.concatenate(groups)[start - before : stop - before]

    def _group(self, group: int) -> Numbers:
        shards = self._order_P[group * SHUFFLED_TOGETHER : (group + 1) * SHUFFLED_TOGETHER]
        numbers = np.concatenate([self._shards.kept(int(shard)) for shard in shards])
        return np.random.default_rng([*self._key, _GROUP, group]).permutation(numbers)


class _FixedSize:
    """Cut the order into windows, and these into batches whose sizes differ by at most one.

    Attributes:
        edges: positions in the order where windows begin, and its end.
    """

    def __init__(self, samples: int, batch_size: int) -> None:
        steps = -(-samples // batch_size)
        self._steps = np.append(np.arange(0, steps, SORTED_TOGETHER), steps)
        self._smallest, self._larger = divmod(samples, steps)
        self.edges = self._steps * self._smallest + np.minimum(self._steps, self._larger)

    def sizes(self, window: int, tokens_n: Column) -> Numbers:
        """Return the sizes of the batches of a window; they do not depend on the lengths of its prompts."""
        return self._smallest + (np.arange(*self._steps[window : window + 2]) < self._larger)

    def survey(self, windows: Iterable[Column]) -> tuple[Numbers, int]:
        """Return the cumulative number of batches after each window (W), and the smallest batch; plan no window."""
        return self._steps[1:], self._smallest


class _TokenBudget:
    """Cut the order into windows, and these into batches as large as a budget of padded tokens allows.

    Attributes:
        edges: see `_FixedSize`.
    """

    def __init__(self, samples: int, tokens_S: Column, budget: int, slots: int) -> None:
        self._budget, self._slots = budget, slots
        longest = int(tokens_S.max()) + slots
        if longest > budget:
            problem = f"the longest user prompt has {longest} tokens, more than train.tokens_per_batch = {budget}"
            raise UserError(problem, "raise train.tokens_per_batch, or shorten prompts with prompt.max_tokens")
        mean = int(tokens_S.sum(dtype=np.int64)) / len(tokens_S) + slots
        release_pages(tokens_S)
        windows = -(-samples // (SORTED_TOGETHER * max(1, int(budget / mean))))
        self.edges = samples * np.arange(windows + 1) // windows

    def sizes(self, window: int, tokens_n: Column) -> Numbers:
        """Return the sizes of the batches of a window, given the lengths of its prompts, shortest first.

        Batches are cut from the longest prompt down; the last two are balanced, so none is small.
        """
        sizes, left = [], len(tokens_n)
        while left:
            sizes.append(min(left, self._budget // max(1, int(tokens_n[left - 1]) + self._slots)))
            left -= sizes[-1]
        if len(sizes) > 1 and sizes[-1] < sizes[-2]:
            rest = sizes[-2] + sizes[-1]
            sizes[-2:] = [rest - rest // 2, rest // 2]
        return np.array(sizes[::-1])

    def survey(self, windows: Iterable[Column]) -> tuple[Numbers, int]:
        """Return the cumulative number of batches after each window (W), and the smallest batch."""
        sizes = [self.sizes(window, tokens_n) for window, tokens_n in enumerate(windows)]
        return np.cumsum([len(part) for part in sizes]), min(int(part.min()) for part in sizes)
