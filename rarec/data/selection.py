"""Select training samples: denoise, diversify, draw a share, report what was dropped (docs/method.md, section 5 [N]).

The samples are read twice, a block of users at a time: they are counted, and then drawn. So memory grows with the kept
samples alone.

Shape letters: S samples of a block, K kept samples, U users, N items, V values, G buckets of the grid, A ages, F fates
of a sample, W distinct words, E word occurrences over interactions, I interactions.
"""

import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from rarec.config.schema import Shards
from rarec.data.dataset import Int32, Int64, Mask, PreparedDataset
from rarec.data.shards.samples import fold_of
from rarec.errors import UserError

Range = tuple[int, int] | None
"""Smallest and largest value of a bucket; None if it is empty."""
EXAMPLES, EXAMPLE_HISTORY = 5, 5
BLOCK = 1 << 20
"""Interactions of a block."""
LARGEST_GROUP = 10**9
"""Size of the largest group for which numpy draws a hypergeometric number."""
CANDIDATE, WORDLESS, NOTHING_SHARED, TRAINS_ID_MODEL = range(4)
"""Fates of a sample before the draw: it may be drawn; denoising drops it, because its target's title has no words, or
shares none with an earlier title of the user; or the ID model trains on its target."""
NOISE = [WORDLESS, NOTHING_SHARED]
DROPPED = {WORDLESS: "target_without_words", NOTHING_SHARED: "no_shared_word", TRAINS_ID_MODEL: "trains_the_id_model"}
"""Names of the reasons in the report."""


@dataclass(frozen=True)
class Selection:
    """The selected samples: one part of the users after the other, each in random order.

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


def select_samples(
    dataset: PreparedDataset, config: Shards, seed: int, holdout: float = 0.0, folds: int = 1
) -> Selection:
    """Select training samples.

    Denoising drops a sample if no earlier title of the user shares a word with the target's title. The share refers to
    *all* training samples, is capped by `max_samples`, and is drawn from the remaining ones. With `diversify` it is
    drawn evenly over the grid of buckets. Else with a holdout the newest of each user come first, then those before:
    they are most like what is recommended next. Else it is drawn uniformly. If fewer remain, all of them are kept.

    Args:
        dataset: prepared dataset.
        config: the section `shards`.
        seed: seed of the draw.
        holdout: only this share of each user's training interactions, the newest, become targets; 0 for all.
        folds: number of parts of the users; the samples of one are behind those of the part before.

    Raises:
        UserError: there is no sample, or denoising leaves none.
    """
    if not (dataset.train_length_U > 1).any():
        raise UserError("no user has two training interactions, so there is no sample", "provide a larger log")
    samples = _Samples(dataset, config, holdout)
    counts_FG, candidates_A = samples.count()
    candidates_G = counts_FG[CANDIDATE]
    noise = int(counts_FG[NOISE].sum())
    if not candidates_G.any():
        problem = f"shards.denoise drops all {noise} training samples: no target shares a title word with its history"
        remedy = "set shards.denoise to false, or set prepare.items.title to a column of words"
        raise UserError(problem, remedy)
    total = int(counts_FG.sum())
    wanted = min(max(1, round(config.share * total)), config.max_samples or total)
    rng = np.random.default_rng([seed, *b"shards"])
    if config.diversify:
        sampler = GroupSampler(candidates_G, even_shares(candidates_G, wanted, rng), rng)
    else:
        sampler = GroupSampler(candidates_A, wanted - (np.cumsum(candidates_A) - candidates_A), rng)
    noise_sampler = GroupSampler(np.array([noise]), np.array([EXAMPLES]), np.random.default_rng([seed, *b"noise"]))
    users_K, positions_K, examples = _draw(samples, sampler, noise_sampler, config.diversify)
    order = rng.permutation(len(users_K))
    order = order[np.argsort(fold_of(users_K[order], folds), kind="stable")]
    buckets_K = samples.grid.bucket(users_K, dataset.items_at(users_K, positions_K))
    kept_G = np.bincount(buckets_K, minlength=samples.grid.size)
    report = _report(samples.grid, counts_FG, kept_G, wanted) | {"noise": examples}
    return Selection(users_K[order], positions_K[order], report)


def _draw(
    samples: "_Samples", sampler: "GroupSampler", noise_sampler: "GroupSampler", diversify: bool
) -> tuple[Int32, Int32, list[dict[str, Any]]]:
    """Return the users and positions of the drawn samples, and examples of what denoising drops."""
    kept = []
    examples = []
    for block in samples.blocks():
        groups_S = block.buckets_S if diversify else block.ages_S
        drawn = sampler.draw(np.where(block.fates_S == CANDIDATE, groups_S, -1))
        kept.append((block.users_S[drawn], block.positions_S[drawn]))
        shown = noise_sampler.draw(np.where(np.isin(block.fates_S, NOISE), 0, -1))
        examples += [_example(samples.dataset, int(block.users_S[row]), int(block.positions_S[row])) for row in shown]
    users_K, positions_K = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    return users_K, positions_K, examples


def _report(grid: "Grid", counts_FG: Int64, kept_G: Int64, wanted: int) -> dict[str, Any]:
    """Return the counts of samples before and after each step, the drops by reason, and the buckets."""
    all_G, candidates_G = counts_FG.sum(axis=0), counts_FG[CANDIDATE]
    total, candidates, kept = (int(counts_G.sum()) for counts_G in (all_G, candidates_G, kept_G))
    dropped = {name: int(counts_FG[fate].sum()) for fate, name in DROPPED.items()}
    return {
        "samples": {"all": total, "after_denoise": candidates, "wanted": wanted, "kept": kept},
        "dropped": dropped | {"not_drawn": candidates - kept},
        "buckets": grid.report(all=all_G, after_denoise=candidates_G, kept=kept_G),
    }


def equal_frequency(values_V: npt.NDArray[np.integer], count: int, above: int) -> tuple[Int64, list[Range]]:
    """Cut the values above a number into buckets of equal size; equal values share a bucket, so some may be empty.

    Returns:
        The bucket of each value (V,), -1 for one that is not above the number; and the range of each bucket.
    """
    counted_V = values_V > above
    ordered = np.sort(values_V[counted_V])
    edges = ordered[np.arange(1, count) * len(ordered) // count]
    buckets_V = np.where(counted_V, np.searchsorted(edges, values_V, side="right"), -1)
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
        self._users_U, self._lengths = equal_frequency(dataset.train_length_U, config.length_buckets, 1)
        self._items_N, self._popularity = equal_frequency(dataset.train_counts_N, config.popularity_buckets, 0)
        self.size = len(self._lengths) * len(self._popularity)

    def bucket(self, users_S: Int32, items_S: Int32) -> Int64:
        """Return the bucket of each sample."""
        buckets_S: Int64 = self._users_U[users_S] * len(self._popularity) + self._items_N[items_S]
        return buckets_S

    def report(self, **counts_G: Int64) -> list[dict[str, Any]]:
        """Return one row for each bucket with a sample: its ranges, and the number of samples of each kind."""
        ranges = product(self._lengths, self._popularity)
        rows = zip(ranges, *(count_G.tolist() for count_G in counts_G.values()), strict=True)
        return [
            {"history_length": length, "popularity": popularity, **dict(zip(counts_G, counts, strict=True))}
            for (length, popularity), *counts in rows
            if any(counts)
        ]


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
        self._left_G, self._wanted_G, self._rng = counts_G.copy(), np.clip(shares_G, 0, counts_G), rng

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
        buckets_S: buckets of the grid.
        ages_S: with a holdout the number of the user's training interactions after each; 0 without.
        fates_S: what happens to each before the draw.
    """

    users_S: Int32
    positions_S: Int32
    buckets_S: Int64
    ages_S: Int64
    fates_S: npt.NDArray[np.integer]


class _Samples:
    """All training samples, a block at a time; which share a word is computed once, and kept as bits."""

    def __init__(self, dataset: PreparedDataset, config: Shards, holdout: float) -> None:
        self.dataset = dataset
        self._first_target_U = dataset.train_length_U - dataset.held_out_U(holdout) if holdout else None
        self.grid = Grid(dataset, config)
        self._words_NW = title_words(dataset.titles, dataset.untitled) if config.denoise else None
        self._sharing: dict[int, npt.NDArray[np.uint8]] = {}

    def blocks(self) -> Iterator[_Block]:
        for users in self.dataset.user_blocks(BLOCK):
            users_S, positions_S = self.dataset.training_samples(users)
            targets_S = self.dataset.items_at(users_S, positions_S)
            fates_S = np.full(len(users_S), CANDIDATE)
            if self._words_NW is not None:
                fates_S[~self._shares_word(self._words_NW, users, len(users_S))] = NOTHING_SHARED
                fates_S[np.diff(self._words_NW.indptr)[targets_S] == 0] = WORDLESS
            ages_S = np.zeros(len(users_S), np.int64)
            if self._first_target_U is not None:
                fates_S[positions_S < self._first_target_U[users_S]] = TRAINS_ID_MODEL
                ages_S += self.dataset.train_length_U[users_S] - 1 - positions_S
            yield _Block(users_S, positions_S, self.grid.bucket(users_S, targets_S), ages_S, fates_S)

    def count(self) -> tuple[Int64, Int64]:
        """Return the number of samples of each fate in each bucket, and that of the candidates of each age."""
        shape = TRAINS_ID_MODEL + 1, self.grid.size
        counts_FG = np.zeros(shape, np.int64)
        candidates_A = np.zeros(int(self.dataset.train_length_U.max()), np.int64)
        for block in self.blocks():
            cells_S = np.ravel_multi_index((block.fates_S, block.buckets_S), shape)
            counts_FG += np.bincount(cells_S, minlength=counts_FG.size).reshape(shape)
            ages_S = block.ages_S[block.fates_S == CANDIDATE]
            candidates_A += np.bincount(ages_S, minlength=len(candidates_A))
        return counts_FG, candidates_A

    def _shares_word(self, words_NW: csr_array, users: slice, samples: int) -> Mask:
        """Return True where the target's title shares a word with an earlier one."""
        if users.start not in self._sharing:
            users_i, positions_i = self.dataset.training_positions(users)
            sharing_i = shares_word(words_NW, users_i, self.dataset.items_at(users_i, positions_i))
            self._sharing[users.start] = np.packbits(sharing_i[positions_i > 0])
        return np.unpackbits(self._sharing[users.start], count=samples).astype(bool)


def _example(dataset: PreparedDataset, user: int, position: int) -> dict[str, Any]:
    """Return a dropped sample with titles instead of rows."""
    items = dataset.history(user, position + 1)[-EXAMPLE_HISTORY - 1 :]
    *history, target = (dataset.titles[int(item)] for item in items)
    return {"history": history, "target": target}


# ---- words of titles


class _Letters(dict[int, str]):
    """Table for `str.translate`: keeps letters, marks, digits and apostrophes, and maps the rest to spaces."""

    def __missing__(self, code: int) -> str:
        character = "'" if chr(code) == "’" else chr(code)
        kept = character == "'" or unicodedata.category(character)[0] in "LMN"
        return self.setdefault(code, character if kept else " ")


_LETTERS = _Letters()

_STOP = """
a about above after all also am an and any are as at be been before being below between both but by can could
did do does doing down during each for from further had has have having he her here hers him his how i if in
into is it its just me more most my no nor not now of off on once only or other our ours out over own same she
should so some such than that the their theirs them then there these they this those through to too under
until up very was we were what when where which while who whom why will with would you your yours
"""
STOP_WORDS = frozenset(_STOP.split())
"""English function words, which say nothing about the similarity of two titles (our list)."""


def split_words(title: str) -> list[str]:
    """Return the distinct words of a title in order of appearance: case-folded, no punctuation, no stop words.

    A word is a run of letters and digits of any script, with apostrophes inside it; in a script without word separators
    whole phrases are returned.
    """
    folded = unicodedata.normalize("NFKC", title).casefold().translate(_LETTERS)
    distinct = dict.fromkeys(word.strip("'") for word in folded.split())
    return [word for word in distinct if word and word not in STOP_WORDS]


def title_words(titles: Iterable[str], untitled: str) -> csr_array:
    """Return which item has which word in its title (N, W); the placeholder for a missing title has none."""
    numbers: dict[str, int] = {}
    words, starts = array("q"), array("q", [0])  # a list of objects would take ten times as much
    for title in titles:
        own = [] if title == untitled else split_words(title)
        words.extend(numbers.setdefault(word, len(numbers)) for word in own)
        starts.append(len(words))
    shape = len(starts) - 1, len(numbers)
    return csr_array((np.ones(len(words), np.bool_), np.array(words, np.int64), np.array(starts)), shape)


def shares_word(words_NW: csr_array, user_rows_I: Int32, item_rows_I: Int32) -> Mask:
    """Return (I,) True where a title shares a word with an earlier title of the same user.

    Args:
        words_NW: from `title_words`.
        user_rows_I: ascending user rows.
        item_rows_I: item rows, in each user's order.
    """
    words_IW = words_NW[item_rows_I]
    interactions_E = np.repeat(np.arange(len(item_rows_I)), np.diff(words_IW.indptr))
    keys_E = user_rows_I[interactions_E].astype(np.int64) * words_NW.shape[1] + words_IW.indices
    # np.unique returns the first occurrence of each (user, word); later ones share it
    _, first, inverse_E = np.unique(keys_E, return_index=True, return_inverse=True)
    repeats_E = interactions_E[first][inverse_E] < interactions_E
    shared: Mask = np.bincount(interactions_E[repeats_E], minlength=len(item_rows_I)) > 0
    return shared
