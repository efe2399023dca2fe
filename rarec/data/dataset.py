"""Open a prepared dataset as plain arrays and columns, all of them memory-mapped, and prove that it does not leak.

Shape letters: U users, N items, I interactions, S samples or targets, i interactions of a block.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from rarec.data.tables import INTERACTIONS, ITEMS, USERS, Column, number_column, text_column
from rarec.errors import UserError
from rarec.storage.artefacts import check_files, read_manifest

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
BLOCK = 1 << 22
"""Interactions of a block of users."""


@dataclass(frozen=True)
class EvalTargets:
    """The questions of one part of the split: the target of each, in the order of user rows, then of positions.

    Attributes:
        user_rows: (S,); a user has one question, or every one of a window.
        positions: (S,) position of the target in the user's sequence; the items before it are the history.
        item_rows: (S,) the target.
    """

    user_rows: Int32
    positions: Int32
    item_rows: Int32


@dataclass(frozen=True)
class PreparedDataset:
    """Users, items and the split. Rows are dense integers from 0; ids are the ones of the log.

    Attributes:
        directory: directory of the artefact.
        manifest: its manifest, with counts, steps and settings.
        hash: hash of the artefact.
        user_ids: (U,) int64 or string.
        item_ids: (N,) int64 or string.
        titles: (N,) titles, none of them empty.
        texts: (N,) further text, possibly empty.
        train_counts_N: number of training interactions of each item.
        starts_U: index of a user's first interaction in `item_rows_I`.
        lengths_U: number of interactions of each user.
        train_length_U: number of training interactions of each user, counted from the first.
        validation_U: position of the validation target in the user's sequence, or -1.
        test_U: position of the test target, or -1.
        item_rows_I: item of every interaction, grouped by user row, in each user's order.
        refit: whether the validation interactions train as well; see `refitted`.
    """

    directory: Path
    manifest: Mapping[str, Any]
    hash: str
    user_ids: Column[int | str]
    item_ids: Column[int | str]
    titles: Column[str]
    texts: Column[str]
    train_counts_N: Int64
    starts_U: Int64
    lengths_U: Int32
    train_length_U: Int32
    validation_U: Int32
    test_U: Int32
    item_rows_I: Int32
    refit: bool = False

    @classmethod
    def open(cls, directory: Path) -> "PreparedDataset":
        """Map a prepared dataset into memory, and check every file against the manifest.

        Args:
            directory: directory of the artefact.

        Raises:
            UserError: the dataset is missing, has another kind or schema, or a file differs from what was written.
        """
        manifest = read_manifest(directory, "prepare")
        check_files(directory, manifest, remember=True)
        return cls(
            directory=directory,
            manifest=manifest,
            hash=manifest["hash"],
            user_ids=text_column(directory, USERS, "user_id"),
            item_ids=text_column(directory, ITEMS, "item_id"),
            titles=text_column(directory, ITEMS, "title"),
            texts=text_column(directory, ITEMS, "text"),
            train_counts_N=number_column(directory, ITEMS, "train_count"),
            starts_U=number_column(directory, USERS, "start"),
            lengths_U=number_column(directory, USERS, "length"),
            train_length_U=number_column(directory, USERS, "train_length"),
            validation_U=number_column(directory, USERS, "validation"),
            test_U=number_column(directory, USERS, "test"),
            item_rows_I=number_column(directory, INTERACTIONS, "item_row"),
        )

    @property
    def n_users(self) -> int:
        """The number of users."""
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        """The number of items."""
        return len(self.item_ids)

    @property
    def untitled(self) -> str:
        """The text that replaces a missing title."""
        return str(self.manifest["settings"]["prepare"]["items"]["untitled"])

    @property
    def order(self) -> str:
        """The column that orders the interactions: `time` or `position`."""
        return "time" if self.manifest["settings"]["prepare"]["interactions"]["time"] is not None else "position"

    def held_out_U(self, share: float) -> Int32:
        """Return the number of each user's newest training interactions that make up a share.

        Args:
            share: fraction of the training interactions; 0 holds out none.

        Returns:
            (U,) at least one for each user with two or more training interactions, and never all of them.
        """
        if not share:
            return np.zeros_like(self.train_length_U)
        wanted_U = np.maximum(np.floor(self.train_length_U * share), 1).astype(np.int32)
        held_U: Int32 = np.minimum(wanted_U, np.maximum(self.train_length_U - 1, 0))
        return held_U

    def holding_out(self, share: float, users_U: Mask | None = None) -> "PreparedDataset":
        """Return the dataset without the newest training interactions of each user, or of some users.

        Validation and test targets and their histories stay as they are.

        Args:
            share: fraction of each user's training interactions to hold out.
            users_U: marks the users; all by default.
        """
        train_length_U = self.train_length_U - self.held_out_U(share) * (True if users_U is None else users_U)
        return self._training_on(train_length_U)

    def refitted(self) -> "PreparedDataset":
        """Return the dataset with the validation interactions as training: for models that are fitted without a choice.

        Validation and test targets and their histories stay as they are.
        """
        until_U = np.where(self.test_U >= 0, self.test_U, self.lengths_U)
        lengths_U = np.where(self.validation_U >= 0, until_U, self.train_length_U)
        return replace(self._training_on(lengths_U), refit=True)

    def _training_on(self, train_length_U: Int32) -> "PreparedDataset":
        """Return the dataset with other numbers of training interactions."""
        changed = replace(self, train_length_U=train_length_U)
        counts_N = np.zeros(self.n_items, np.int64)
        for _, items_i in changed.training_items():
            counts_N += np.bincount(items_i, minlength=self.n_items)
        return replace(changed, train_counts_N=counts_N)

    def training_items(self) -> Iterator[tuple[slice, Int32]]:
        """Yield runs of users, and the item rows of all their training interactions, user by user, oldest first."""
        for users in self.user_blocks():
            yield users, self.items_at(*self.training_positions(users))

    def user_blocks(self, interactions: int = BLOCK) -> Iterator[slice]:
        """Yield all users in runs with at most so many interactions, or of one user: it bounds the memory of a pass."""
        start = 0
        while start < self.n_users:
            end, stop = self.starts_U[start] + interactions, self.n_users
            if end < len(self.item_rows_I):
                stop = max(int(np.searchsorted(self.starts_U, end, side="right")) - 1, start + 1)
            yield slice(start, stop)
            start = stop

    def sequence(self, user_row: int) -> Int32:
        """Return the item rows of all interactions of a user, oldest first, as a view."""
        start = int(self.starts_U[user_row])
        return self.item_rows_I[start : start + int(self.lengths_U[user_row])]

    def history(self, user_row: int, position: int) -> Int32:
        """Return the item rows before `position` in the user's sequence, oldest first, as a view."""
        return self.sequence(user_row)[:position]

    def training_positions(self, users: slice = slice(None)) -> tuple[Int32, Int32]:
        """Return the positions of the training interactions of all users, or of a run of users.

        Returns:
            user_rows_i, positions_i: sorted by user, then position.
        """
        rows_u = np.arange(self.n_users, dtype=np.int32)[users]
        lengths_u = self.train_length_U[users].astype(np.int64)
        starts_u = np.cumsum(lengths_u) - lengths_u
        positions_i = np.arange(lengths_u.sum()) - np.repeat(starts_u, lengths_u)
        return np.repeat(rows_u, lengths_u), positions_i.astype(np.int32)

    def training_samples(self, users: slice = slice(None)) -> tuple[Int32, Int32]:
        """Return the training positions with a history: those of `training_positions` but each user's first."""
        user_rows_i, positions_i = self.training_positions(users)
        has_history_i = positions_i > 0
        return user_rows_i[has_history_i], positions_i[has_history_i]

    def items_at(self, user_rows: Int32, positions: Int32) -> Int32:
        """Return the item row at each of (S,) positions of (S,) users."""
        items: Int32 = self.item_rows_I[self.starts_U[user_rows] + positions]
        return items

    def targets(
        self, part: Literal["validation", "test"], limit: int | None = None, seed: int = 0, *, every: bool = False
    ) -> EvalTargets:
        """Return the targets of one part of the split, in the order of user rows.

        Args:
            part: `validation` or `test`.
            limit: largest number of users; a fixed random subset is drawn if there are more.
            seed: seed of that draw.
            every: each interaction of the part from a user's first target on is a target.
        """
        positions_U = self.validation_U if part == "validation" else self.test_U
        user_rows = np.flatnonzero(positions_U >= 0).astype(np.int32)
        if limit is not None and limit < len(user_rows):
            user_rows = np.sort(np.random.default_rng(seed).choice(user_rows, limit, replace=False))
        positions = positions_U[user_rows]
        if every:
            ends_U = np.where(self.test_U >= 0, self.test_U, self.lengths_U) if part == "validation" else self.lengths_U
            counts = ends_U[user_rows] - positions
            before = np.repeat(np.cumsum(counts) - counts, counts)
            user_rows, positions = np.repeat(user_rows, counts), np.repeat(positions, counts)
            positions = (positions + np.arange(len(before)) - before).astype(np.int32)
        return EvalTargets(user_rows, positions, self.items_at(user_rows, positions))


def check_no_leaks(dataset: PreparedDataset) -> None:
    """Verify that no validation or test target, and nothing from the future, can enter training.

    Training reads a user's first `train_length` interactions only. This is proved from the written files alone, a block
    of interactions at a time.

    Raises:
        UserError: a target is in its user's training part, popularity counts more than training interactions, a user's
            interactions are not sorted, or a temporal split has an interaction outside its window.
    """
    if not np.array_equal(dataset.starts_U, np.cumsum(dataset.lengths_U, dtype=np.int64) - dataset.lengths_U):
        raise _leak(f"{USERS}: the slices of users overlap or have gaps")
    _check_targets(dataset)
    counts_N = np.zeros(dataset.n_items, np.int64)
    start, last = 0, -np.inf
    with pq.ParquetFile(dataset.directory / INTERACTIONS) as file:
        for group in range(file.num_row_groups):
            order_i = file.read_row_group(group, [dataset.order]).column(0).to_numpy()
            counts_N += _check_block(dataset, start, order_i, last)
            start += len(order_i)
            last = order_i[-1]
    if not np.array_equal(counts_N, dataset.train_counts_N):
        raise _leak(f"{ITEMS}: train_count is not the number of training interactions")


def _check_targets(dataset: PreparedDataset) -> None:
    """Check that each target is after the training part, and the validation target before the test target."""
    validation_U, test_U = dataset.validation_U, dataset.test_U
    users_U = np.arange(dataset.n_users)
    for part, position_U in {"validation": validation_U, "test": test_U}.items():
        trained_U = (position_U >= 0) & (position_U < np.maximum(dataset.train_length_U, 1))
        _refuse_any(dataset, users_U, trained_U, f"the {part} target of user {{}} is in the training part")
    late_U = (validation_U >= 0) & (test_U >= 0) & (validation_U >= test_U)
    _refuse_any(dataset, users_U, late_U, "user {} has a validation target at or after the test target")


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
    unsorted_i = (order_i < np.concatenate([[last], order_i[:-1]])) & (positions_i > 0)
    _refuse_any(dataset, users_i, unsorted_i, f"the interactions of user {{}} are not sorted by {dataset.order}")
    if dataset.manifest["settings"]["prepare"]["split"]["kind"] == "temporal":
        first, second = dataset.manifest["cut_times"]
        late_i = trains_i & (order_i >= first)
        _refuse_any(dataset, users_i, late_i, f"user {{}} trains at or after the first cut, {first}")
        windows = {"validation": (dataset.validation_U, first, second), "test": (dataset.test_U, second, np.inf)}
        for part, (position_U, begin, end) in windows.items():
            outside_i = (position_U[users_i] == positions_i) & ((order_i < begin) | (order_i >= end))
            _refuse_any(dataset, users_i, outside_i, f"the {part} target of user {{}} is outside its window")
    return np.bincount(dataset.item_rows_I[rows_i[trains_i]], minlength=dataset.n_items)


def _refuse_any(dataset: PreparedDataset, users: Int64, wrong: Mask, problem: str) -> None:
    """Raise a problem, with the id of the first user where `wrong` is True in place of `{}`."""
    if wrong.any():
        raise _leak(problem.format(dataset.user_ids[int(users[np.argmax(wrong)])]))


def _leak(problem: str) -> UserError:
    return UserError(f"the prepared dataset leaks: {problem}", "this is a bug in rarec: please report it with the log")
