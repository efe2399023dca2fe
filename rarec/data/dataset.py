"""Open a prepared dataset as plain arrays.

Shape letters: U users, N items, I interactions, S samples or targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rarec.artefacts import read_manifest
from rarec.data import tables
from rarec.errors import UserError
from rarec.files import sha256_file

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


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
    user_ids: pa.Array
    item_ids: pa.Array
    titles: list[str]
    texts: list[str]
    train_counts_N: Int64
    starts_U: Int64
    lengths_U: Int32
    train_length_U: Int32
    validation_U: Int32
    test_U: Int32
    item_rows_I: Int32

    @classmethod
    def open(cls, directory: Path) -> "PreparedDataset":
        """Read a prepared dataset and check every file against the manifest.

        Args:
            directory: directory of the artefact.

        Raises:
            UserError: the dataset is missing, has another kind or schema, or a file differs from what was written.
        """
        manifest = read_manifest(directory, "prepare")
        for name, digest in manifest["files"].items():
            path = directory / name
            if not path.exists() or sha256_file(path) != digest:
                raise UserError(
                    f"{path} was changed after it was written (sha256 differs)",
                    "rebuild it: rarec prepare CONFIG --fresh",
                )
        users, items, interactions = _tables(directory)
        return cls(
            directory=directory,
            manifest=manifest,
            hash=manifest["hash"],
            user_ids=users["user_id"].combine_chunks(),
            item_ids=items["item_id"].combine_chunks(),
            titles=items["title"].to_pylist(),
            texts=items["text"].to_pylist(),
            train_counts_N=items["train_count"].to_numpy(),
            starts_U=users["start"].to_numpy(),
            lengths_U=users["length"].to_numpy(),
            train_length_U=users["train_length"].to_numpy(),
            validation_U=users["validation"].to_numpy(),
            test_U=users["test"].to_numpy(),
            item_rows_I=interactions["item_row"].to_numpy(),
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
        trains_I = np.arange(len(self.item_rows_I)) < np.repeat(self.starts_U + train_length_U, self.lengths_U)
        counts_N = np.bincount(self.item_rows_I[trains_I], minlength=self.n_items)
        return replace(self, train_length_U=train_length_U, train_counts_N=counts_N)

    def sequence(self, user_row: int) -> Int32:
        """Return the item rows of all interactions of a user, oldest first, as a view."""
        start = int(self.starts_U[user_row])
        return self.item_rows_I[start : start + int(self.lengths_U[user_row])]

    def history(self, user_row: int, position: int) -> Int32:
        """Return the item rows before `position` in the user's sequence, oldest first, as a view."""
        return self.sequence(user_row)[:position]

    def training_samples(self) -> tuple[Int32, Int32]:
        """Return all training positions with a history: (user_rows_S, positions_S), sorted by user, then position."""
        counts_U = np.maximum(self.train_length_U - 1, 0)
        user_rows_S = np.repeat(np.arange(self.n_users, dtype=np.int32), counts_U)
        before_U = np.cumsum(counts_U, dtype=np.int64) - counts_U
        positions_S = np.arange(len(user_rows_S)) - np.repeat(before_U, counts_U) + 1
        return user_rows_S, positions_S.astype(np.int32)

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


def _tables(directory: Path) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Read users, items, and the item column of the interactions."""
    users = [tables.users_schema(kind) for kind in tables.ID_TYPES]
    items = [tables.items_schema(kind) for kind in tables.ID_TYPES]
    interactions = [tables.interactions_schema(order) for order in ("time", "position")]
    return (
        tables.read_rows(directory / tables.USERS, users, users[0].names),
        tables.read_rows(directory / tables.ITEMS, items, items[0].names),
        tables.read_rows(directory / tables.INTERACTIONS, interactions, ["item_row"]),
    )
