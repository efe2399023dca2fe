"""Select training samples: denoise, diversify, draw a share, report what was dropped (docs/method.md, section 5 [N]).

All samples pass by twice, a block of users at a time: they are counted, and then drawn. So memory grows with the kept
samples alone.

Shape letters: S samples of a block, K kept samples, G buckets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.config.schema import Shards
from rarec.data.dataset import Int32, Int64, PreparedDataset
from rarec.data.selection.buckets import Grid, GroupSampler, Mask, even_shares
from rarec.data.selection.title_words import TitleWords
from rarec.errors import UserError

EXAMPLES, EXAMPLE_HISTORY = 5, 5
AT_A_TIME = 1 << 20
"""Interactions of a block."""


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
        dropped = f"shards.denoise drops all {counts.eligible} training samples"
        remedy = "set shards.denoise to false, or set prepare.items.title to a column of words"
        raise UserError(f"{dropped}: no target shares a title word with its history", remedy)
    wanted = min(max(1, round(config.share * counts.total)), config.max_samples or counts.total)
    candidates_G = counts.candidates_G if config.diversify else counts.candidates_G.sum(keepdims=True)
    sampler = GroupSampler(candidates_G, even_shares(candidates_G, wanted, rng), rng)
    noise = GroupSampler(np.array([counts.noise]), np.array([EXAMPLES]), np.random.default_rng([seed, *b"noise"]))
    kept, kept_G, examples = [], np.zeros_like(counts.all_G), []
    for block in samples.blocks():
        candidate_S = block.eligible_S & block.sharing_S
        drawn = sampler.draw(np.where(candidate_S, block.buckets_S if config.diversify else 0, -1))
        kept.append((block.users_S[drawn], block.positions_S[drawn]))
        kept_G += np.bincount(block.buckets_S[drawn], minlength=len(kept_G))
        shown = noise.draw(np.where(block.eligible_S & ~block.sharing_S, 0, -1))
        examples += [_example(dataset, int(block.users_S[at]), int(block.positions_S[at])) for at in shown]
    users_K, positions_K = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    order = rng.permutation(len(users_K))
    kinds = {"all": counts.all_G, "after_denoise": counts.candidates_G, "kept": kept_G}
    report = {**counts.report(wanted, len(order)), "buckets": samples.grid.report(**kinds), "noise": examples}
    return Selection(users_K[order], positions_K[order], report)


@dataclass(frozen=True)
class _Block:
    """The samples of some users.

    Attributes:
        users_S: rows of their users.
        positions_S: places of the targets in the users' sequences.
        targets_S: item rows.
        buckets_S: buckets of the grid.
        eligible_S: True where the ID model does not train on the target.
        sharing_S: True where the target's title shares a word with an earlier one; everywhere without denoising.
    """

    users_S: Int32
    positions_S: Int32
    targets_S: Int32
    buckets_S: Int64
    eligible_S: Mask
    sharing_S: Mask


class _Samples:
    """All training samples, a block at a time; which share a word is found in the first pass, and kept as bits."""

    def __init__(self, dataset: PreparedDataset, config: Shards, holdout: float) -> None:
        self._dataset, self._holdout = dataset, holdout
        self.grid = Grid.of(dataset, config)
        self.words = TitleWords.of(dataset.titles, dataset.untitled) if config.denoise else None
        self._sharing: dict[int, npt.NDArray[np.uint8]] = {}

    def blocks(self) -> Iterator[_Block]:
        dataset = self._dataset
        trained_U = dataset.train_length_U - dataset.held_out_U(self._holdout)
        for users in dataset.user_blocks(AT_A_TIME):
            users_S, positions_S = dataset.training_samples(users)
            targets_S = dataset.items_at(users_S, positions_S)
            eligible_S = positions_S >= trained_U[users_S] if self._holdout else np.ones(len(users_S), bool)
            buckets_S = self.grid.bucket(users_S, targets_S)
            yield _Block(users_S, positions_S, targets_S, buckets_S, eligible_S, self._sharing_of(users, len(users_S)))

    def _sharing_of(self, users: slice, samples: int) -> Mask:
        if self.words is None:
            return np.ones(samples, bool)
        if users.start not in self._sharing:
            self._sharing[users.start] = np.packbits(self._find_sharing(self.words, users))
        return np.unpackbits(self._sharing[users.start], count=samples).astype(bool)

    def _find_sharing(self, words: TitleWords, users: slice) -> Mask:
        dataset = self._dataset
        lengths_u = dataset.train_length_U[users].astype(np.int64)
        users_i = np.repeat(np.arange(users.start, users.stop), lengths_u)
        places_i = np.arange(len(users_i)) - np.repeat(np.cumsum(lengths_u) - lengths_u, lengths_u)
        items_i = dataset.item_rows_I[dataset.starts_U[users_i] + places_i]
        return words.shared_with_earlier(users_i, items_i)[places_i > 0]


@dataclass(frozen=True)
class _Counts:
    """What the first pass counts.

    Attributes:
        all_G: samples in each bucket.
        candidates_G: those that may be drawn.
        eligible: samples whose target the ID model does not train on.
        wordless: of these, the ones that are dropped because the target's title has no words.
    """

    all_G: Int64
    candidates_G: Int64
    eligible: int
    wordless: int

    @classmethod
    def of(cls, samples: _Samples) -> "_Counts":
        all_G, candidates_G = np.zeros((2, samples.grid.size), np.int64)
        eligible = wordless = 0
        for block in samples.blocks():
            candidate_S = block.eligible_S & block.sharing_S
            all_G += np.bincount(block.buckets_S, minlength=len(all_G))
            candidates_G += np.bincount(block.buckets_S[candidate_S], minlength=len(all_G))
            eligible += int(block.eligible_S.sum())
            if samples.words is not None:
                noise = block.targets_S[block.eligible_S & ~block.sharing_S]
                wordless += int((samples.words.counts_N[noise] == 0).sum())
        return cls(all_G, candidates_G, eligible, wordless)

    @property
    def total(self) -> int:
        return int(self.all_G.sum())

    @property
    def candidates(self) -> int:
        return int(self.candidates_G.sum())

    @property
    def noise(self) -> int:
        return self.eligible - self.candidates

    def report(self, wanted: int, kept: int) -> dict[str, dict[str, int]]:
        numbers = {"all": self.total, "after_denoise": self.candidates, "wanted": wanted, "kept": kept}
        dropped = {"target_without_words": self.wordless, "no_shared_word": self.noise - self.wordless}
        dropped |= {"trains_the_id_model": self.total - self.eligible, "not_drawn": self.candidates - kept}
        return {"samples": numbers, "dropped": dropped}


def _example(dataset: PreparedDataset, user: int, position: int) -> dict[str, Any]:
    """Return a dropped sample with titles instead of rows."""
    history = dataset.history(user, position)[-EXAMPLE_HISTORY:]
    return {
        "history": [dataset.titles[int(item)] for item in history],
        "target": dataset.titles[int(dataset.sequence(user)[position])],
    }
