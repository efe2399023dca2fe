"""Select training samples: denoise, diversify, draw a share, report what was dropped (docs/method.md, section 5 [N]).

The samples are read twice, a block of users at a time: they are counted, and then drawn. So memory grows with the kept
samples alone.

Shape letters: S samples of a block, K kept samples, U users, N items, V values, G buckets of the grid.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.config.schema import Shards
from rarec.data.dataset import Int32, Int64, PreparedDataset
from rarec.data.title_words import TitleWords
from rarec.errors import UserError

Mask = npt.NDArray[np.bool_]
Range = tuple[int, int] | None
"""Smallest and largest value of a bucket; None if it is empty."""
EXAMPLES, EXAMPLE_HISTORY = 5, 5
BLOCK = 1 << 20
"""Interactions of a block."""
LARGEST_GROUP = 10**9
"""Size of the largest group for which numpy draws a hypergeometric number."""


@dataclass(frozen=True)
class Selection:
    """The selected samples, in random order.

    The order spreads a user's samples over the shards: the stream mixes only a few shards at a time, and a batch would
    otherwise contain few users.

    Attributes:
        user_rows: (K,).
        positions: (K,) position of the target in the user's sequence.
        report: counts, drops by reason, buckets before and after, and examples; plain JSON.
    """

    user_rows: Int32
    positions: Int32
    report: dict[str, Any]


def select_samples(dataset: PreparedDataset, config: Shards, seed: int, holdout: float = 0.0) -> Selection:
    """Select training samples.

    Denoising drops a sample if no earlier title of the user shares a word with the target's title. The share refers to
    *all* training samples, is capped by `max_samples`, and is drawn from the remaining ones: evenly over the grid of
    buckets, or uniformly if `diversify` is off. If fewer remain than that, all of them are kept.

    Args:
        dataset: prepared dataset.
        config: the section `shards`.
        seed: seed of the draw.
        holdout: only this share of each user's training interactions, the newest, become targets; 0 for all.

    Raises:
        UserError: there is no sample, or denoising leaves none.
    """
    if not (dataset.train_length_U > 1).any():
        raise UserError("no user has two training interactions, so there is no sample", "provide a larger log")
    rng = np.random.default_rng([seed, *b"shards"])
    samples = _Samples(dataset, config, holdout)
    counts = _Counts.of(samples)
    if not counts.candidates:
        dropped = f"shards.denoise drops all {counts.noise} training samples"
        remedy = "set shards.denoise to false, or set prepare.items.title to a column of words"
        raise UserError(f"{dropped}: no target shares a title word with its history", remedy)
    wanted = min(max(1, round(config.share * counts.total)), config.max_samples or counts.total)
    candidates_G = counts.candidates_G if config.diversify else counts.candidates_G.sum(keepdims=True)
    sampler = GroupSampler(candidates_G, even_shares(candidates_G, wanted, rng), rng)
    noise = GroupSampler(np.array([counts.noise]), np.array([EXAMPLES]), np.random.default_rng([seed, *b"noise"]))
    kept, kept_G, examples = [], np.zeros_like(counts.all_G), []
    for block in samples.blocks():
        drawn = sampler.draw(np.where(block.candidate_S, block.buckets_S if config.diversify else 0, -1))
        kept.append((block.users_S[drawn], block.positions_S[drawn]))
        kept_G += np.bincount(block.buckets_S[drawn], minlength=len(kept_G))
        shown = noise.draw(np.where(block.noise_S, 0, -1))
        examples += [_example(dataset, int(block.users_S[row]), int(block.positions_S[row])) for row in shown]
    users_K, positions_K = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    order = rng.permutation(len(users_K))
    kinds = {"all": counts.all_G, "after_denoise": counts.candidates_G, "kept": kept_G}
    report = {**counts.report(wanted, len(order)), "buckets": samples.grid.report(**kinds), "noise": examples}
    return Selection(users_K[order], positions_K[order], report)


def equal_frequency(values_V: npt.NDArray[np.integer], count: int) -> tuple[Int64, list[Range]]:
    """Cut values into buckets of equal size; equal values share a bucket, so some may be empty.

    Returns:
        The bucket of each value (V,), and the range of each bucket.
    """
    ordered = np.sort(values_V)
    edges = ordered[np.arange(1, count) * len(ordered) // count]
    buckets_V = np.searchsorted(edges, values_V, side="right").astype(np.int64)
    parts = [values_V[buckets_V == bucket] for bucket in range(count)]
    return buckets_V, [(int(part.min()), int(part.max())) if len(part) else None for part in parts]


class Grid:
    """Equal-frequency buckets of users by training length and of items by training popularity (our choice).

    Only users with a sample and items that occur in training are counted.

    Args:
        dataset: prepared dataset.
        config: number of buckets of each.

    Attributes:
        size: the number of buckets, G.
    """

    def __init__(self, dataset: PreparedDataset, config: Shards) -> None:
        self._users_U, self._lengths = _buckets(dataset.train_length_U, 1, config.length_buckets)
        self._items_N, self._popularity = _buckets(dataset.train_counts_N, 0, config.popularity_buckets)
        self.size = len(self._lengths) * len(self._popularity)

    def bucket(self, users_S: Int32, items_S: Int32) -> Int64:
        """Return the bucket of each sample."""
        buckets_S: Int64 = self._users_U[users_S] * len(self._popularity) + self._items_N[items_S]
        return buckets_S

    def report(self, **counts_G: Int64) -> list[dict[str, Any]]:
        """Return one row for each bucket with a sample: its ranges, and the number of samples of each kind."""
        columns = len(self._popularity)
        return [
            {
                "history_length": self._lengths[bucket // columns],
                "popularity": self._popularity[bucket % columns],
                **{name: int(count_G[bucket]) for name, count_G in counts_G.items()},
            }
            for bucket in range(self.size)
            if any(count_G[bucket] for count_G in counts_G.values())
        ]


def _buckets(values_V: npt.NDArray[np.integer], above: int, count: int) -> tuple[Int64, list[Range]]:
    """Return `equal_frequency` of the values above a number; the bucket of the others is -1."""
    buckets_V, counted_V = np.full(len(values_V), -1), values_V > above
    buckets_V[counted_V], ranges = equal_frequency(values_V[counted_V], count)
    return buckets_V, ranges


def even_shares(counts_G: Int64, wanted: int, rng: np.random.Generator) -> Int64:
    """Return how many samples to draw from each bucket: one from each in turn, until there are enough.

    An exhausted bucket is skipped. Which buckets come first in the last round is random.

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
    """Draws from groups of samples without replacement while they are read in blocks; memory is that of a block.

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
            rows = np.flatnonzero(groups_S == group)
            left, wanted = int(self._left_G[group]), int(self._wanted_G[group])
            take = min(wanted, len(rows)) if wanted in (0, left) else self._number(len(rows), left, wanted)
            drawn.append(rows if take == len(rows) else self._rng.choice(rows, take, replace=False))
            self._left_G[group] -= len(rows)
            self._wanted_G[group] -= take
        return np.sort(np.concatenate(drawn))

    def _number(self, size: int, left: int, wanted: int) -> int:
        """Draw how many of the `wanted` samples of all that are `left` are in a block of some size."""
        if left <= LARGEST_GROUP:
            return int(self._rng.hypergeometric(size, left - size, wanted))
        number = int(self._rng.binomial(size, wanted / left))  # of a group so large, it differs by next to nothing
        return min(max(number, wanted - (left - size)), wanted)


@dataclass(frozen=True)
class _Block:
    """The samples of some users.

    Attributes:
        users_S: rows of their users.
        positions_S: positions of the targets in the users' sequences.
        targets_S: item rows.
        buckets_S: buckets of the grid.
        candidate_S: True where the sample may be drawn.
        noise_S: True where denoising drops it; neither holds where the ID model trains on the target.
    """

    users_S: Int32
    positions_S: Int32
    targets_S: Int32
    buckets_S: Int64
    candidate_S: Mask
    noise_S: Mask


class _Samples:
    """All training samples, a block at a time; which share a word is computed once, and kept as bits."""

    def __init__(self, dataset: PreparedDataset, config: Shards, holdout: float) -> None:
        self._dataset, self._holdout = dataset, holdout
        self.grid = Grid(dataset, config)
        self.words = TitleWords.of(dataset.titles, dataset.untitled) if config.denoise else None
        self._sharing: dict[int, npt.NDArray[np.uint8]] = {}

    def blocks(self) -> Iterator[_Block]:
        dataset = self._dataset
        first_target_U = dataset.train_length_U - dataset.held_out_U(self._holdout)
        for users in dataset.user_blocks(BLOCK):
            users_S, positions_S = dataset.training_samples(users)
            targets_S = dataset.items_at(users_S, positions_S)
            eligible_S = positions_S >= first_target_U[users_S] if self._holdout else np.ones(len(users_S), bool)
            sharing_S = self._shares_word(users, len(users_S))
            buckets_S = self.grid.bucket(users_S, targets_S)
            yield _Block(users_S, positions_S, targets_S, buckets_S, eligible_S & sharing_S, eligible_S & ~sharing_S)

    def _shares_word(self, users: slice, samples: int) -> Mask:
        """Return True where the target's title shares a word with an earlier one; everywhere without denoising."""
        if self.words is None:
            return np.ones(samples, bool)
        if users.start not in self._sharing:
            users_i, positions_i = self._dataset.training_positions(users)
            items_i = self._dataset.items_at(users_i, positions_i)
            sharing_i = self.words.shared_with_earlier(users_i, items_i)
            self._sharing[users.start] = np.packbits(sharing_i[positions_i > 0])
        return np.unpackbits(self._sharing[users.start], count=samples).astype(bool)


@dataclass(frozen=True)
class _Counts:
    """Counts of the first pass.

    Attributes:
        all_G: samples in each bucket.
        candidates_G: those that may be drawn.
        noise: samples that denoising drops.
        wordless: of these, the ones whose target's title has no words.
    """

    all_G: Int64
    candidates_G: Int64
    noise: int
    wordless: int

    @classmethod
    def of(cls, samples: _Samples) -> "_Counts":
        all_G, candidates_G = np.zeros((2, samples.grid.size), np.int64)
        noise = wordless = 0
        for block in samples.blocks():
            all_G += np.bincount(block.buckets_S, minlength=len(all_G))
            candidates_G += np.bincount(block.buckets_S[block.candidate_S], minlength=len(all_G))
            noise += int(block.noise_S.sum())
            if samples.words is not None:
                wordless += int((samples.words.counts_N[block.targets_S[block.noise_S]] == 0).sum())
        return cls(all_G, candidates_G, noise, wordless)

    @property
    def total(self) -> int:
        return int(self.all_G.sum())

    @property
    def candidates(self) -> int:
        return int(self.candidates_G.sum())

    def report(self, wanted: int, kept: int) -> dict[str, dict[str, int]]:
        numbers = {"all": self.total, "after_denoise": self.candidates, "wanted": wanted, "kept": kept}
        dropped = {
            "target_without_words": self.wordless,
            "no_shared_word": self.noise - self.wordless,
            "trains_the_id_model": self.total - self.candidates - self.noise,
            "not_drawn": self.candidates - kept,
        }
        return {"samples": numbers, "dropped": dropped}


def _example(dataset: PreparedDataset, user: int, position: int) -> dict[str, Any]:
    """Return a dropped sample with titles instead of rows."""
    history = dataset.history(user, position)[-EXAMPLE_HISTORY:]
    return {
        "history": [dataset.titles[int(item)] for item in history],
        "target": dataset.titles[int(dataset.sequence(user)[position])],
    }
