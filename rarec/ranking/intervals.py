"""Percentile bootstrap intervals over users. Shape letters: U users, M metrics, R resamples in a batch."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BATCH_BYTES = 64 << 20
"""Bytes of resampled user indices held at a time."""


class Interval(NamedTuple):
    """A mean over users and its 95% interval."""

    mean: float
    low: float
    high: float


def mean_interval(values_U: npt.ArrayLike, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean over users with its percentile bootstrap 95% interval.

    Args:
        values_U: one value per user.
        resamples: number of resamples of the users, drawn with replacement.
        seed: of the resampling.

    Raises:
        ValueError: no users.
    """
    return mean_intervals({"value": np.asarray(values_U, dtype=np.float64)}, resamples, seed)["value"]


def paired_interval(a_U: npt.ArrayLike, b_U: npt.ArrayLike, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of a - b over the same users, with its interval; an interval without 0 is a difference."""
    return mean_interval(np.asarray(a_U, dtype=np.float64) - np.asarray(b_U, dtype=np.float64), resamples, seed)


def paired_intervals(
    a: Mapping[str, Floats], b: Mapping[str, Floats], resamples: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """Return `paired_interval` of every metric of `a`, all on the same resamples of the users."""
    return mean_intervals({name: a[name] - b[name] for name in a}, resamples, seed)


def mean_intervals(values: Mapping[str, Floats], resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """Return `mean_interval` of many metrics of the same users, all on the same resamples.

    A resample is drawn once, as indices of users. Its means are (number of draws of each user) x (values), one matrix
    product for all metrics. The draws depend on the number of users and the seed alone, not on the values.
    """
    values_UM = np.stack([np.asarray(column, dtype=np.float64) for column in values.values()], axis=1)
    n_users = len(values_UM)
    if n_users == 0:
        raise ValueError("an interval needs at least one user")
    means_M = values_UM.mean(axis=0)
    low_M, high_M = _percentiles(values_UM, resamples, seed) if n_users > 1 else (means_M, means_M)
    return {
        name: Interval(float(mean), float(low), float(high))
        for name, mean, low, high in zip(values, means_M, low_M, high_M, strict=True)
    }


def _percentiles(values_UM: Floats, resamples: int, seed: int) -> tuple[Floats, Floats]:
    n_users = len(values_UM)

    def means(users: npt.NDArray[np.int64], axis: int = -1) -> Floats:
        users_RU = np.atleast_2d(users)
        offset_R1 = np.arange(len(users_RU))[:, None] * n_users
        drawn = np.bincount((users_RU + offset_R1).ravel(), minlength=users_RU.size)
        means_MR = (drawn.reshape(users_RU.shape) @ values_UM).T / n_users
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
