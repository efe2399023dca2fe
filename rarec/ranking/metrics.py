"""Ranking metrics with one relevant item per user, from its rank, and bootstrap intervals of their means over users.

Shape letters: U users, Q questions, M metrics, R resamples in a batch.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Users = npt.NDArray[np.integer]
Name = TypeVar("Name")

SELECTED_BY = "ndcg@100"
"""The validation metric that selects the epoch of an ID model and the step of a variant. It covers the first hundred
ranks, over which HR@100 is reported, and still weighs the first ten most (our choice; papers mostly use NDCG@10)."""
SELECTION_CUTOFFS = (10, 100)
"""Cutoffs of the metrics that a validation reports."""
BATCH_BYTES = 64 << 20
"""Bytes of resampled user indices held at a time."""


def hit_rate(ranks_U: npt.NDArray[np.int64], cutoff: int) -> Floats:
    """Return HR@K of each user: 1 if the target is among the first K, else 0. With one target it equals Recall@K."""
    return (ranks_U <= cutoff).astype(np.float64)


def ndcg(ranks_U: npt.NDArray[np.int64], cutoff: int) -> Floats:
    """Return NDCG@K of each user: 1 / log2(1 + rank) within the first K, else 0 (the ideal DCG of one target is 1)."""
    return np.where(ranks_U <= cutoff, 1 / np.log2(1.0 + ranks_U), 0.0)


def mrr(ranks_U: npt.NDArray[np.int64]) -> Floats:
    """Return the reciprocal rank of each user, over the full catalogue, without a cutoff."""
    return 1.0 / ranks_U


def metric_values(ranks_U: npt.NDArray[np.int64], cutoffs: Iterable[int]) -> dict[str, Floats]:
    """Return per-user values of every metric; the mean over users is the metric's figure.

    Args:
        ranks_U: ranks, 1 the best, as `rank_scores` returns them.
        cutoffs: each K of HR@K and NDCG@K.

    Returns:
        `hr@K` and `ndcg@K` for each K, then `mrr`; each of shape (U,).

    Raises:
        ValueError: a rank is below 1.
    """
    ranks_U = np.asarray(ranks_U, dtype=np.int64)
    if (ranks_U < 1).any():
        raise ValueError("ranks start at 1")
    cutoffs = tuple(cutoffs)
    values = {f"hr@{cutoff}": hit_rate(ranks_U, cutoff) for cutoff in cutoffs}
    values |= {f"ndcg@{cutoff}": ndcg(ranks_U, cutoff) for cutoff in cutoffs}
    return values | {"mrr": mrr(ranks_U)}


def validation_metrics(ranks_U: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return the means over validation users of HR and NDCG at the selection cutoffs, and MRR."""
    return {name: float(values.mean()) for name, values in metric_values(ranks_U, SELECTION_CUTOFFS).items()}


class Interval(NamedTuple):
    """A mean over users and its 95% interval."""

    mean: float
    low: float
    high: float


def mean_intervals(
    values: Mapping[Name, Floats], resamples: int = 2000, seed: int = 0, users: Users | None = None
) -> dict[Name, Interval]:
    """Return means with their percentile bootstrap 95% intervals, of many metrics of the same questions.

    All are on the same resamples. A resample is drawn once, as indices of users: the questions of one user hang
    together. Its means are (number of draws of each user) x (sums of their values), one matrix product for all metrics,
    over the questions drawn. The draws depend on the number of users and the seed alone, not on the values.

    Args:
        values: one value per question, by metric.
        resamples: number of resamples of the users, drawn with replacement.
        seed: of the resampling.
        users: the user of each question; None if each has one.

    Raises:
        ValueError: no users.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in values.values()]
    if not len(columns[0]):
        raise ValueError("an interval needs at least one user")
    users = np.arange(len(columns[0])) if users is None else users
    _, first_U, user_Q = np.unique(users, return_index=True, return_inverse=True)
    user_Q = first_U.argsort().argsort()[user_Q]  # in the order of their first questions
    asked_U = np.bincount(user_Q)
    sums_UM: Floats = np.stack([np.bincount(user_Q, column) for column in columns], axis=1).astype(np.float64)
    means_M = np.array([column.mean() for column in columns])
    low_M, high_M = _percentiles(sums_UM, asked_U, resamples, seed) if len(asked_U) > 1 else (means_M, means_M)
    return {
        name: Interval(float(mean), float(low), float(high))
        for name, mean, low, high in zip(values, means_M, low_M, high_M, strict=True)
    }


def paired_intervals(
    a: Mapping[str, Floats],
    b: Mapping[str, Floats],
    resamples: int = 2000,
    seed: int = 0,
    users: Users | None = None,
) -> dict[str, Interval]:
    """Return `mean_intervals` of a - b for every metric of `a`; an interval without 0 is a difference."""
    return mean_intervals({name: a[name] - b[name] for name in a}, resamples, seed, users)


def _percentiles(sums_UM: Floats, asked_U: Users, resamples: int, seed: int) -> tuple[Floats, Floats]:
    n_users = len(asked_U)

    def means(users: npt.NDArray[np.int64], axis: int = -1) -> Floats:
        users_RU = np.atleast_2d(users)
        offset_R1 = np.arange(len(users_RU))[:, None] * n_users
        drawn_RU = np.bincount((users_RU + offset_R1).ravel(), minlength=users_RU.size).reshape(users_RU.shape)
        means_MR = (drawn_RU @ sums_UM).T / (drawn_RU @ asked_U)
        return means_MR if users.ndim > 1 else means_MR[:, 0]

    from scipy.stats import bootstrap  # half a second, which no other command should wait for

    result = bootstrap(
        (np.arange(n_users),),
        means,
        n_resamples=resamples,
        batch=max(1, BATCH_BYTES // (8 * n_users)),
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return result.confidence_interval.low, result.confidence_interval.high
