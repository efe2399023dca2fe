"""Select training samples: denoise, diversify, draw a share, report what was dropped (docs/method.md, section 5 [N]).

Shape letters: S samples, C candidates (after denoising), U users, N items, V values, G buckets of the grid.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.config.schema import Shards
from rarec.data.dataset import Int32, Int64, PreparedDataset
from rarec.data.selection.title_words import TitleWords
from rarec.errors import UserError

Mask = npt.NDArray[np.bool_]
EXAMPLES, EXAMPLE_HISTORY = 5, 5
USERS_AT_A_TIME = 1 << 14
"""Users denoised at a time, which bounds memory."""


@dataclass(frozen=True)
class Selection:
    """The selected samples, in random order.

    The order spreads a user's samples over the shards: the stream mixes only a few shards at a time, and a batch would
    otherwise contain few users.

    Attributes:
        user_rows: (S,).
        positions: (S,) position of the target in the user's sequence.
        report: counts, drops by reason, buckets before and after, and examples; plain JSON.
    """

    user_rows: Int32
    positions: Int32
    report: dict[str, Any]


def select_samples(dataset: PreparedDataset, config: Shards, seed: int, holdout: float = 0.0) -> Selection:
    """Select training samples.

    Denoising drops a sample if no earlier title of the user shares a word with the target's title. The share refers to
    *all* training samples and is drawn from the remaining ones: evenly over the grid of buckets, or uniformly if
    `diversify` is off. If fewer remain than the share asks for, all of them are kept.

    Args:
        dataset: prepared dataset.
        config: the section `shards`.
        seed: seed of the draw.
        holdout: only this share of each user's training interactions, the newest, become targets; 0 for all.

    Raises:
        UserError: there is no sample, or denoising leaves none.
    """
    rng = np.random.default_rng([seed, *b"shards"])
    users_S, positions_S = dataset.training_samples()
    targets_S = dataset.items_at(users_S, positions_S)
    titles = TitleWords.of(dataset.titles, dataset.untitled)
    sharing_S = _sharing(dataset, titles) if config.denoise else np.ones(len(users_S), bool)
    eligible_S = _eligible(dataset, holdout, users_S, positions_S)
    candidates_C = np.flatnonzero(sharing_S & eligible_S)
    _raise_if_empty(users_S, eligible_S, candidates_C)
    grid = _Grid.of(dataset, config)
    buckets_S = grid.bucket(users_S, targets_S)
    wanted = max(1, round(config.share * len(users_S)))
    drawn = _draw(buckets_S[candidates_C], wanted, config.diversify, rng)
    chosen = candidates_C[rng.permutation(drawn)]
    noise = np.flatnonzero(~sharing_S & eligible_S)
    wordless = int((titles.counts_N[targets_S[noise]] == 0).sum())
    dropped = {"target_without_words": wordless, "no_shared_word": len(noise) - wordless}
    dropped["trains_the_id_model"] = int((~eligible_S).sum())
    report = {
        "samples": {"all": len(users_S), "after_denoise": len(candidates_C), "wanted": wanted, "kept": len(chosen)},
        "dropped": {**dropped, "not_drawn": len(candidates_C) - len(chosen)},
        "buckets": grid.report(all=buckets_S, after_denoise=buckets_S[candidates_C], kept=buckets_S[chosen]),
        "noise": _examples(dataset, users_S, positions_S, rng.permutation(noise)[:EXAMPLES]),
    }
    return Selection(users_S[chosen], positions_S[chosen], report)


def _eligible(dataset: PreparedDataset, holdout: float, users_S: Int32, positions_S: Int32) -> Mask:
    """Return (S,) True for the samples whose target the ID model does not train on."""
    if not holdout:
        return np.ones(len(users_S), bool)
    trained_U = dataset.train_length_U - dataset.held_out_U(holdout)
    eligible_S: Mask = positions_S >= trained_U[users_S]
    return eligible_S


def _raise_if_empty(users_S: Int32, eligible_S: Mask, candidates_C: Int64) -> None:
    if not len(users_S):
        raise UserError("no user has two training interactions, so there is no sample", "provide a larger log")
    if not len(candidates_C):
        dropped = f"shards.denoise drops all {eligible_S.sum()} training samples"
        remedy = "set shards.denoise to false, or set prepare.items.title to a column of words"
        raise UserError(f"{dropped}: no target shares a title word with its history", remedy)


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


def draw_evenly(buckets_S: Int64, wanted: int, rng: np.random.Generator) -> Int64:
    """Draw without replacement from the buckets in turn; when a bucket is exhausted, the others continue.

    The order within a bucket, and the buckets that come first in the last round, are random.

    Args:
        buckets_S: bucket of each sample.
        wanted: number of samples to draw; all if there are fewer.
        rng: random generator of the draw.

    Returns:
        Indices into `buckets_S`.
    """
    shuffled = rng.permutation(len(buckets_S))
    by_bucket = shuffled[np.argsort(buckets_S[shuffled], kind="stable")]
    _, starts, counts = np.unique(buckets_S[by_bucket], return_index=True, return_counts=True)
    round_S = np.arange(len(by_bucket)) - np.repeat(starts, counts)
    turns = np.lexsort((rng.random(len(by_bucket)), round_S))
    drawn: Int64 = by_bucket[turns[:wanted]]
    return drawn


def _sharing(dataset: PreparedDataset, titles: TitleWords) -> Mask:
    """Return (S,) True for training samples that share a word with their history, some users at a time."""
    parts: list[Mask] = []
    for start in range(0, dataset.n_users, USERS_AT_A_TIME):
        lengths = dataset.train_length_U[start : start + USERS_AT_A_TIME].astype(np.int64)
        users = np.repeat(np.arange(start, start + len(lengths)), lengths)
        positions = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        items = dataset.item_rows_I[dataset.starts_U[users] + positions]
        parts.append(titles.shared_with_earlier(users, items)[positions > 0])
    return np.concatenate(parts)


def _draw(buckets_C: Int64, wanted: int, evenly: bool, rng: np.random.Generator) -> Int64:
    """Draw candidates evenly over the buckets, or uniformly as if there were one bucket."""
    return draw_evenly(buckets_C if evenly else np.zeros_like(buckets_C), wanted, rng)


@dataclass(frozen=True)
class _Grid:
    """Equal-frequency buckets of users by training length and of items by training popularity (our choice).

    Only users with a sample and items that occur in training are counted.
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
        """Return the bucket of each sample."""
        buckets_S: Int64 = self.users_U[users_S] * len(self.popularity.ranges) + self.items_N[items_S]
        return buckets_S

    def report(self, **buckets: Int64) -> list[dict[str, Any]]:
        """Return one row per non-empty bucket: its ranges, and the number of samples of each kind."""
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
    """Scatter buckets back to the rows selected by `where`; -1 elsewhere."""
    rows = np.full(len(where), -1)
    rows[where] = buckets
    return rows


def _examples(dataset: PreparedDataset, users_S: Int32, positions_S: Int32, rows: Int64) -> list[dict[str, Any]]:
    """Return a few dropped samples with titles instead of rows."""
    pairs = [(int(users_S[row]), int(positions_S[row])) for row in rows]
    return [
        {
            "history": [dataset.titles[item] for item in dataset.history(user, position)[-EXAMPLE_HISTORY:]],
            "target": dataset.titles[dataset.sequence(user)[position]],
        }
        for user, position in pairs
    ]
