"""Verify that no validation or test target, and nothing from the future, can enter training.

Training reads a user's first `train_length` interactions only. This check proves it from the written tables alone.

Shape letters: U users, N items, I interactions, T training interactions.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.data import tables
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError

CHUNK = 1 << 24
"""Interactions processed at a time, which bounds memory on large logs."""


def check_no_leaks(dataset: PreparedDataset) -> None:
    """Check that a prepared dataset does not leak.

    Raises:
        UserError: a target is in its user's training part, popularity counts more than training interactions, a user's
            interactions are not sorted, or a temporal split has an interaction outside its window.
    """
    if not np.array_equal(dataset.starts_U, np.cumsum(dataset.lengths_U, dtype=np.int64) - dataset.lengths_U):
        raise _leak(f"{tables.USERS}: the slices of users overlap or have gaps")
    _check_targets(dataset)
    training_I = training_mask(dataset)
    counts_N = np.zeros(dataset.n_items, np.int64)
    for piece in _chunks(training_I):
        counts_N += np.bincount(dataset.item_rows_I[piece][training_I[piece]], minlength=dataset.n_items)
    if not np.array_equal(counts_N, dataset.train_counts_N):
        raise _leak(f"{tables.ITEMS}: train_count is not the number of training interactions")
    _check_order(dataset, training_I)


def training_mask(dataset: PreparedDataset) -> npt.NDArray[np.bool_]:
    """Return (I,) True for the training interactions: the first `train_length` of each user."""
    trained = dataset.train_length_U > 0
    steps_I = np.zeros(len(dataset.item_rows_I) + 1, np.int8)
    steps_I[dataset.starts_U[trained]] += 1
    steps_I[(dataset.starts_U + dataset.train_length_U)[trained]] -= 1
    mask_I: npt.NDArray[np.bool_] = np.cumsum(steps_I[:-1], dtype=np.int8).astype(bool)
    return mask_I


def _chunks(array: npt.NDArray[Any]) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, len(array), CHUNK)]


def _check_targets(dataset: PreparedDataset) -> None:
    validation_U, test_U = dataset.validation_U, dataset.test_U
    targets = {"validation": validation_U, "test": test_U}
    for part, position_U in targets.items():
        bad = np.flatnonzero((position_U >= 0) & (position_U < np.maximum(dataset.train_length_U, 1)))
        if bad.size:
            raise _leak(f"the {part} target of user {dataset.user_ids[int(bad[0])]} is in the training part")
    bad = np.flatnonzero((validation_U >= 0) & (test_U >= 0) & (validation_U >= test_U))
    if bad.size:
        raise _leak(f"user {dataset.user_ids[int(bad[0])]} has a validation target at or after the test target")


def _check_order(dataset: PreparedDataset, training_I: npt.NDArray[np.bool_]) -> None:
    """Check that times do not decrease within a user, and check the windows of a temporal split."""
    order = dataset.order
    order_I = tables.read_columns(dataset.directory / tables.INTERACTIONS, [order])[order].to_numpy()
    first_I = np.zeros(len(order_I), bool)
    first_I[dataset.starts_U[dataset.lengths_U > 0]] = True
    for piece in _chunks(order_I):
        after = slice(piece.start + 1, piece.stop + 1)
        back = np.flatnonzero((order_I[after] < order_I[piece][: len(order_I[after])]) & ~first_I[after])
        if back.size:
            user = int(np.searchsorted(dataset.starts_U, after.start + back[0], side="right")) - 1
            raise _leak(f"the interactions of user {dataset.user_ids[user]} are not sorted by {order}")
    if dataset.manifest["settings"]["prepare"]["split"]["kind"] == "temporal":
        _check_windows(dataset, order_I, training_I)


def _check_windows(
    dataset: PreparedDataset, order_I: npt.NDArray[np.float64], training_I: npt.NDArray[np.bool_]
) -> None:
    """Check that a temporal split trains before its first cut, validates up to the second, and tests after it."""
    first, second = dataset.manifest["cut_times"]
    if any((order_I[piece][training_I[piece]] >= first).any() for piece in _chunks(order_I)):
        raise _leak(f"a training interaction is at or after the first cut, {first}")
    for part, position_U, since, until in (
        ("validation", dataset.validation_U, first, second),
        ("test", dataset.test_U, second, np.inf),
    ):
        users = np.flatnonzero(position_U >= 0)
        times = order_I[dataset.starts_U[users] + position_U[users]]
        outside = users[(times < since) | (times >= until)]
        if outside.size:
            raise _leak(f"the {part} target of user {dataset.user_ids[int(outside[0])]} is outside its window")


def _leak(problem: str) -> UserError:
    return UserError(f"the prepared dataset leaks: {problem}", "this is a bug in rarec: please report it with the log")
