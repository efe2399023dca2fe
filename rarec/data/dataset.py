"""Open a prepared dataset as plain arrays and columns, all of them memory-mapped.

Shape letters: U users, N items, I interactions, S samples or targets.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rarec.data import tables
from rarec.data.tables import Column, TableColumns
from rarec.storage.artefacts import check_files, read_manifest

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
BLOCK = 1 << 22
"""Interactions of a block of users."""


@dataclass(frozen=True)
class EvalTargets:
    """The evaluation targets of one part of the split: one item for each of S users, in the order of user rows.

    Attributes:
        user_rows: (S,).
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
        users = TableColumns(directory, tables.USERS, [tables.users_schema(kind) for kind in tables.ID_TYPES])
        items = TableColumns(directory, tables.ITEMS, [tables.items_schema(kind) for kind in tables.ID_TYPES])
        schemas = [tables.interactions_schema(order) for order in ("time", "position")]
        interactions = TableColumns(directory, tables.INTERACTIONS, schemas)
        return cls(
            directory=directory,
            manifest=manifest,
            hash=manifest["hash"],
            user_ids=users.texts("user_id"),
            item_ids=items.texts("item_id"),
            titles=items.texts("title"),
            texts=items.texts("text"),
            train_counts_N=items.numbers("train_count"),
            starts_U=users.numbers("start"),
            lengths_U=users.numbers("length"),
            train_length_U=users.numbers("train_length"),
            validation_U=users.numbers("validation"),
            test_U=users.numbers("test"),
            item_rows_I=interactions.numbers("item_row"),
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

    def holding_out(self, share: float) -> "PreparedDataset":
        """Return the dataset without each user's newest training interactions.

        Validation and test targets and their histories stay as they are.

        Args:
            share: fraction of each user's training interactions to hold out.
        """
        train_length_U = self.train_length_U - self.held_out_U(share)
        held = replace(self, train_length_U=train_length_U)
        counts_N = np.zeros(self.n_items, np.int64)
        for _, items_i in held.training_items():
            counts_N += np.bincount(items_i, minlength=self.n_items)
        return replace(held, train_counts_N=counts_N)

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

    def targets(self, part: Literal["validation", "test"], limit: int | None = None, seed: int = 0) -> EvalTargets:
        """Return the targets of one part of the split, in the order of user rows.

        Args:
            part: `validation` or `test`.
            limit: largest number of users; a fixed random subset is drawn if there are more.
            seed: seed of that draw.
        """
        positions_U = self.validation_U if part == "validation" else self.test_U
        user_rows = np.flatnonzero(positions_U >= 0).astype(np.int32)
        if limit is not None and limit < len(user_rows):
            user_rows = np.sort(np.random.default_rng(seed).choice(user_rows, limit, replace=False))
        positions = positions_U[user_rows]
        return EvalTargets(user_rows, positions, self.items_at(user_rows, positions))
