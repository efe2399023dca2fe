"""What the lists of a row are like, whether or not they hold the target: coverage, novelty, intra-list distance.

Rows are compared by the same vectors, those of the ID model: each row's own would be another yardstick.

Shape letters: B users of a chunk, U test users, N catalogue, K items of a list, Z size of a vector.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.data.dataset import PreparedDataset
from rarec.evaluation.results import COVERAGE, DISTANCE, FULL, NOVELTY
from rarec.ranking.metrics import mean_intervals

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.integer]


def self_information(dataset: PreparedDataset) -> Floats:
    """Return -log2 of each item's share of the users in training, (N,): of one user where there is none."""
    users_N = np.zeros(dataset.n_items, np.int64)
    for users, items_i in dataset.training_items():
        user_i = np.repeat(np.arange(users.stop - users.start), dataset.train_length_U[users])
        once = np.unique(user_i * dataset.n_items + items_i)  # a user may have an item again
        users_N += np.bincount(once % dataset.n_items, minlength=dataset.n_items)
    bits_N: Floats = -np.log2(np.maximum(users_N, 1) / max(np.count_nonzero(dataset.train_length_U), 1))
    return bits_N


def novelty(lists_BK: Rows, bits_N: Floats) -> Floats:
    """Return each list's mean self-information (Zhou et al. 2010), (B,); 0 of an empty list.

    Args:
        lists_BK: item rows; -1 where there is none.
        bits_N: self-information of each item.
    """
    listed_BK = lists_BK >= 0
    means_B: Floats = (bits_N[lists_BK] * listed_BK).sum(1) / np.maximum(listed_BK.sum(1), 1)
    return means_B


def distance(lists_BK: Rows, items_NZ: npt.NDArray[np.float32]) -> Floats:
    """Return the mean of 1 - cosine over all pairs of a list's items, (B,); 0 of a list without a pair.

    Args:
        lists_BK: item rows; -1 where there is none.
        items_NZ: vectors; of one that is zero the cosine is 0.
    """
    listed_BK1 = (lists_BK >= 0)[:, :, None]
    vectors_BKZ = items_NZ[lists_BK] * listed_BK1
    lengths_BK1 = np.linalg.norm(vectors_BKZ, axis=2, keepdims=True)
    units_BKZ = vectors_BKZ / np.where(lengths_BK1 > 0, lengths_BK1, 1)
    # |sum|^2 is the sum of all cosines: of every item with itself, and of every pair twice
    cosines_B = (units_BKZ.sum(1) ** 2).sum(1) - (units_BKZ**2).sum((1, 2))
    count_B = listed_BK1.sum((1, 2))
    pairs_B = count_B * (count_B - 1)
    return np.where(pairs_B > 0, 1 - cosines_B / np.maximum(pairs_B, 1), 0.0)


class ListMetrics:
    """Coverage, novelty and distance of the lists of several rows, for the same users.

    Args:
        dataset: prepared dataset.
        items_NZ: vectors by which the items of a list are compared.
    """

    def __init__(self, dataset: PreparedDataset, items_NZ: npt.NDArray[np.float32]) -> None:
        self._bits_N, self._items_NZ = self_information(dataset), items_NZ
        self._covered: dict[str, npt.NDArray[np.bool_]] = {}
        self._values: dict[str, list[Floats]] = {}

    def add(self, row: str, lists_BK: Rows) -> None:
        """Add the lists of a chunk of users.

        Args:
            row: name of the row.
            lists_BK: item rows, best first; -1 where there is none.
        """
        covered_N = self._covered.setdefault(row, np.zeros(len(self._bits_N), np.bool_))
        covered_N[lists_BK[lists_BK >= 0]] = True
        values_B2 = np.stack([novelty(lists_BK, self._bits_N), distance(lists_BK, self._items_NZ)], axis=1)
        self._values.setdefault(row, []).append(values_B2)

    def rows(self, *, resamples: int, seed: int, users: Rows | None = None) -> list[dict[str, Any]]:
        """Return rows of metrics.json; coverage is of all users together, and has no interval.

        Args:
            resamples: number of bootstrap resamples of the users.
            seed: seed of the bootstrap.
            users: the user of each list; None if each has one.
        """
        values = {
            (row, metric): values_U
            for row, parts in self._values.items()
            for metric, values_U in zip((NOVELTY, DISTANCE), np.concatenate(parts).T, strict=True)
        }
        estimates = mean_intervals(values, resamples, seed, users) if values else {}
        rows = []
        for row, covered_N in self._covered.items():
            figures: dict[str, Sequence[float | None]] = {COVERAGE: (float(covered_N.mean()), None, None)}
            figures |= {metric: estimates[row, metric] for metric in (NOVELTY, DISTANCE)}
            for metric, (value, low, high) in figures.items():
                shown = {"value": value, "low": low, "high": high, "n": len(values[row, NOVELTY])}
                rows.append({"variant": row, "metric": metric, "protocol": FULL, **shown})
        return rows
