"""Verify that no validation or test target, and nothing from the future, can enter training.

Training reads a user's first `train_length` interactions only. This check proves it from the written files alone.

Shape letters: U users, N items, i interactions of a block.
"""

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from rarec.data import tables
from rarec.data.dataset import Int64, PreparedDataset
from rarec.errors import UserError

Mask = npt.NDArray[np.bool_]
Float64 = npt.NDArray[np.float64]


def check_no_leaks(dataset: PreparedDataset) -> None:
    """Check that a prepared dataset does not leak, a block of interactions at a time.

    Raises:
        UserError: a target is in its user's training part, popularity counts more than training interactions, a user's
            interactions are not sorted, or a temporal split has an interaction outside its window.
    """
    if not np.array_equal(dataset.starts_U, np.cumsum(dataset.lengths_U, dtype=np.int64) - dataset.lengths_U):
        raise _leak(f"{tables.USERS}: the slices of users overlap or have gaps")
    _check_targets(dataset)
    counts_N = np.zeros(dataset.n_items, np.int64)
    start, last = 0, -np.inf
    with pq.ParquetFile(dataset.directory / tables.INTERACTIONS) as file:
        for group in range(file.num_row_groups):
            order_i = file.read_row_group(group, [dataset.order]).column(0).to_numpy()
            counts_N += _check_block(dataset, start, order_i, last)
            start += len(order_i)
            last = order_i[-1]
    if not np.array_equal(counts_N, dataset.train_counts_N):
        raise _leak(f"{tables.ITEMS}: train_count is not the number of training interactions")


def _check_targets(dataset: PreparedDataset) -> None:
    """Check that each target is after the training part, and the validation target before the test target."""
    validation_U, test_U = dataset.validation_U, dataset.test_U
    for part, position_U in {"validation": validation_U, "test": test_U}.items():
        trained_U = (position_U >= 0) & (position_U < np.maximum(dataset.train_length_U, 1))
        if trained_U.any():
            user = dataset.user_ids[int(np.argmax(trained_U))]
            raise _leak(f"the {part} target of user {user} is in the training part")
    late_U = (validation_U >= 0) & (test_U >= 0) & (validation_U >= test_U)
    if late_U.any():
        user = dataset.user_ids[int(np.argmax(late_U))]
        raise _leak(f"user {user} has a validation target at or after the test target")


def _check_block(dataset: PreparedDataset, start: int, order_i: Float64, last: float) -> Int64:
    """Check consecutive interactions; return the number of training interactions of each item.

    Args:
        dataset: prepared dataset.
        start: the first interaction.
        order_i: time or position of each.
        last: time or position of the interaction before them.
    """
    rows_i = np.arange(start, start + len(order_i))
    users_i = np.searchsorted(dataset.starts_U, rows_i, side="right") - 1
    positions_i = rows_i - dataset.starts_U[users_i]
    trains_i = positions_i < dataset.train_length_U[users_i]
    earlier_i = np.concatenate([[last], order_i[:-1]])
    unsorted_i = (order_i < earlier_i) & (positions_i > 0)
    if unsorted_i.any():
        user = dataset.user_ids[int(users_i[np.argmax(unsorted_i)])]
        raise _leak(f"the interactions of user {user} are not sorted by {dataset.order}")
    if dataset.manifest["settings"]["prepare"]["split"]["kind"] == "temporal":
        _check_windows(dataset, users_i, positions_i, order_i, trains_i)
    return np.bincount(dataset.item_rows_I[rows_i[trains_i]], minlength=dataset.n_items)


def _check_windows(
    dataset: PreparedDataset, users_i: Int64, positions_i: Int64, order_i: Float64, trains_i: Mask
) -> None:
    """Check that a temporal split trains before its first cut, validates up to the second, and tests after it."""
    first, second = dataset.manifest["cut_times"]
    if (order_i[trains_i] >= first).any():
        raise _leak(f"a training interaction is at or after the first cut, {first}")
    windows = {"validation": (dataset.validation_U, first, second), "test": (dataset.test_U, second, np.inf)}
    for part, (position_U, start, end) in windows.items():
        outside_i = (position_U[users_i] == positions_i) & ((order_i < start) | (order_i >= end))
        if outside_i.any():
            user = dataset.user_ids[int(users_i[np.argmax(outside_i)])]
            raise _leak(f"the {part} target of user {user} is outside its window")


def _leak(problem: str) -> UserError:
    return UserError(f"the prepared dataset leaks: {problem}", "this is a bug in rarec: please report it with the log")
