"""Verify that no validation or test target, and nothing from the future, can enter training.

Training reads a user's first `train_length` interactions only. This check proves it from the written files alone.

Shape letters: U users, N items, I interactions; those of a block: u users, i interactions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from rarec.data import tables
from rarec.data.dataset import Int32, PreparedDataset
from rarec.errors import UserError


@dataclass(frozen=True)
class _Block:
    """Some users, one after the other, with their interactions.

    Attributes:
        users: their rows.
        places_i: position of each interaction in its user's sequence.
        trains_i: whether it is a training interaction: one of the first `train_length`.
        order_i: its time or position in the log.
    """

    users: slice
    places_i: npt.NDArray[np.int64]
    trains_i: npt.NDArray[np.bool_]
    order_i: npt.NDArray[np.float64]


def check_no_leaks(dataset: PreparedDataset) -> None:
    """Check that a prepared dataset does not leak, a block of users at a time.

    Raises:
        UserError: a target is in its user's training part, popularity counts more than training interactions, a user's
            interactions are not sorted, or a temporal split has an interaction outside its window.
    """
    if not np.array_equal(dataset.starts_U, np.cumsum(dataset.lengths_U, dtype=np.int64) - dataset.lengths_U):
        raise _leak(f"{tables.USERS}: the slices of users overlap or have gaps")
    _check_targets(dataset)
    counts_N = np.zeros(dataset.n_items, np.int64)
    for block in _blocks(dataset):
        first = int(dataset.starts_U[block.users.start])
        items_i = dataset.item_rows_I[first : first + len(block.trains_i)]
        counts_N += np.bincount(items_i[block.trains_i], minlength=dataset.n_items)
        _check_order(dataset, block)
        if dataset.manifest["settings"]["prepare"]["split"]["kind"] == "temporal":
            _check_windows(dataset, block)
    if not np.array_equal(counts_N, dataset.train_counts_N):
        raise _leak(f"{tables.ITEMS}: train_count is not the number of training interactions")


def _blocks(dataset: PreparedDataset) -> Iterator[_Block]:
    orders, pending_i = _order_of(dataset), np.empty(0)
    for users in dataset.user_blocks():
        places_i, trains_i = dataset.places(users)
        while len(pending_i) < len(places_i):
            pending_i = np.concatenate([pending_i, next(orders)])
        yield _Block(users, places_i, trains_i, pending_i[: len(places_i)])
        pending_i = pending_i[len(places_i) :]


def _order_of(dataset: PreparedDataset) -> Iterator[npt.NDArray[np.float64]]:
    """Yield the column that orders the interactions, a row group at a time."""
    with pq.ParquetFile(dataset.directory / tables.INTERACTIONS) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, [dataset.order]).column(0).to_numpy()


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


def _check_order(dataset: PreparedDataset, block: _Block) -> None:
    """Check that times do not decrease within a user."""
    back = np.flatnonzero((block.order_i[1:] < block.order_i[:-1]) & (block.places_i[1:] > 0))
    if back.size:
        place = dataset.starts_U[block.users.start] + back[0] + 1
        user = int(np.searchsorted(dataset.starts_U, place, side="right")) - 1
        raise _leak(f"the interactions of user {dataset.user_ids[user]} are not sorted by {dataset.order}")


def _check_windows(dataset: PreparedDataset, block: _Block) -> None:
    """Check that a temporal split trains before its first cut, validates up to the second, and tests after it."""
    first, second = dataset.manifest["cut_times"]
    if (block.order_i[block.trains_i] >= first).any():
        raise _leak(f"a training interaction is at or after the first cut, {first}")
    starts_u = dataset.starts_U[block.users] - dataset.starts_U[block.users.start]
    windows: dict[str, tuple[Int32, float, float]] = {
        "validation": (dataset.validation_U[block.users], first, second),
        "test": (dataset.test_U[block.users], second, np.inf),
    }
    for part, (position_u, since, until) in windows.items():
        users = np.flatnonzero(position_u >= 0)
        times = block.order_i[starts_u[users] + position_u[users]]
        outside = users[(times < since) | (times >= until)]
        if outside.size:
            user = dataset.user_ids[block.users.start + int(outside[0])]
            raise _leak(f"the {part} target of user {user} is outside its window")


def _leak(problem: str) -> UserError:
    return UserError(f"the prepared dataset leaks: {problem}", "this is a bug in rarec: please report it with the log")
