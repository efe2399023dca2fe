"""Which training samples are kept: denoise, diversify, share (METHOD.md, section 5 [N]), and a report of what went.

Shape letters: S samples, C candidates (what denoise leaves), U users, N items, G buckets of the grid.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.config.schema import Shards
from rarec.data.dataset import Int32, PreparedDataset
from rarec.data.selection.title_words import TitleWords
from rarec.errors import UserError

Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
EXAMPLES, EXAMPLE_HISTORY = 5, 5
USERS_AT_A_TIME = 1 << 14
"""Bounds the memory of denoising."""


@dataclass(frozen=True)
class Selection:
    """The samples to train on, in random order.

    A user's samples lie apart: the stream mixes a few shards at a time, and otherwise a batch would be of few users.

    Attributes:
        user_rows: (S,).
        positions: (S,) of the target in the user's sequence.
        report: counts, drops with reasons, buckets before and after, examples; plain JSON.
    """

    user_rows: Int32
    positions: Int32
    report: dict[str, Any]


def select_samples(dataset: PreparedDataset, config: Shards, seed: int, holdout: float = 0.0) -> Selection:
    """Choose training samples.

    Denoise drops a sample whose target's title shares no word with the titles of the whole history before it. The share
    is of *all* training samples, drawn from those that are left: evenly over the grid of buckets, or plainly at random
    where diversify is off. Where fewer are left than the share asks for, all of them are kept.

    Args:
        dataset: prepared.
        config: the section `shards`.
        seed: of the draw.
        holdout: of each user's training interactions only this share, the newest, are targets; 0 for all.

    Raises:
        UserError: there is nothing, or denoise leaves nothing.
    """
    rng = np.random.default_rng([seed, *b"shards"])
    users_S, positions_S = dataset.training_samples()
    targets_S = dataset.items_at(users_S, positions_S)
    titles = TitleWords.of(dataset.titles, dataset.untitled)
    sharing_S = _sharing(dataset, titles) if config.denoise else np.ones(len(users_S), bool)
    seen_U = dataset.train_length_U - dataset.held_out_U(holdout) if holdout else np.zeros_like(dataset.train_length_U)
    open_S = positions_S >= seen_U[users_S]
    candidates_C = np.flatnonzero(sharing_S & open_S)
    if not len(users_S):
        raise UserError("no user has two training interactions: there is no sample", "prepare a larger log")
    if not len(candidates_C):
        problem = (
            f"shards.denoise drops all {open_S.sum()} training samples: no target's title has a word of its history"
        )
        raise UserError(problem, "set shards.denoise to false, or name a column of words: prepare.items.title")
    grid = _Grid.of(dataset, config)
    buckets_S = grid.bucket(users_S, targets_S)
    wanted = max(1, round(config.share * len(users_S)))
    drawn = _draw(buckets_S[candidates_C], wanted, config.diversify, rng)
    chosen = candidates_C[rng.permutation(drawn)]
    noise = np.flatnonzero(~sharing_S & open_S)
    wordless = int((titles.counts_N[targets_S[noise]] == 0).sum())
    dropped = {"target_without_words": wordless, "no_shared_word": len(noise) - wordless}
    dropped["trains_the_id_model"] = int((~open_S).sum())
    report = {
        "samples": {"all": len(users_S), "after_denoise": len(candidates_C), "wanted": wanted, "kept": len(chosen)},
        "dropped": {**dropped, "not_drawn": len(candidates_C) - len(chosen)},
        "buckets": grid.report(all=buckets_S, after_denoise=buckets_S[candidates_C], kept=buckets_S[chosen]),
        "noise": _examples(dataset, users_S, positions_S, rng.permutation(noise)[:EXAMPLES]),
    }
    return Selection(users_S[chosen], positions_S[chosen], report)


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


def _sharing(dataset: PreparedDataset, titles: TitleWords) -> Mask:
    """Which training samples share a word with their history, some users at a time."""
    parts: list[Mask] = []
    for start in range(0, dataset.n_users, USERS_AT_A_TIME):
        lengths = dataset.train_length_U[start : start + USERS_AT_A_TIME].astype(np.int64)
        users = np.repeat(np.arange(start, start + len(lengths)), lengths)
        positions = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        items = dataset.item_rows_I[dataset.starts_U[users] + positions]
        parts.append(titles.shared_with_earlier(users, items)[positions > 0])
    return np.concatenate(parts)


def _draw(buckets_C: Int64, wanted: int, evenly: bool, rng: np.random.Generator) -> Int64:
    """Places of the candidates drawn: evenly over the buckets, or as if there were only one."""
    return draw_evenly(buckets_C if evenly else np.zeros_like(buckets_C), wanted, rng)


@dataclass(frozen=True)
class _Grid:
    """Users by training length and items by training popularity, in equal-frequency buckets (ours).

    Only those count that can be in a sample: users with one, and items met in training.
    """

    lengths: Buckets
    popularity: Buckets
    users_U: Int64
    items_N: Int64

    @classmethod
    def of(cls, dataset: PreparedDataset, config: Shards) -> "_Grid":
        users, items = dataset.train_length_U > 1, dataset.train_counts_N > 0
        lengths = Buckets.equal_frequency(dataset.train_length_U[users], config.length_buckets)
        popularity = Buckets.equal_frequency(dataset.train_counts_N[items], config.popularity_buckets)
        return cls(lengths, popularity, _spread(lengths.of_V, users), _spread(popularity.of_V, items))

    def bucket(self, users_S: Int32, items_S: Int32) -> Int64:
        """The sample's place in the grid."""
        buckets_S: Int64 = self.users_U[users_S] * len(self.popularity.ranges) + self.items_N[items_S]
        return buckets_S

    def report(self, **buckets: Int64) -> list[dict[str, Any]]:
        """One row for each place that has samples: the ranges it stands for, and how many samples of each kind."""
        columns, size = len(self.popularity.ranges), len(self.lengths.ranges) * len(self.popularity.ranges)
        counts = {name: np.bincount(of_S, minlength=size).tolist() for name, of_S in buckets.items()}
        return [
            {
                "history_length": self.lengths.ranges[place // columns],
                "popularity": self.popularity.ranges[place % columns],
                **{name: count[place] for name, count in counts.items()},
            }
            for place in range(size)
            if any(count[place] for count in counts.values())
        ]


def _spread(buckets: Int64, where: Mask) -> Int64:
    """Buckets of the rows that have one, back at those rows; -1 elsewhere."""
    rows = np.full(len(where), -1)
    rows[where] = buckets
    return rows


def _examples(dataset: PreparedDataset, users_S: Int32, positions_S: Int32, rows: Int64) -> list[dict[str, Any]]:
    """A few dropped pairs, as people read them."""
    pairs = [(int(users_S[row]), int(positions_S[row])) for row in rows]
    return [
        {
            "history": [dataset.titles[item] for item in dataset.history(user, position)[-EXAMPLE_HISTORY:]],
            "target": dataset.titles[dataset.sequence(user)[position]],
        }
        for user, position in pairs
    ]
