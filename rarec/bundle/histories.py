"""Histories of a log, cleaned and ordered as those that the recommender was trained on."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import ibis.expr.types as ir
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rarec.config.logs import Prepare
from rarec.data.engines import PrepareEngine, compute_value, open_engine
from rarec.data.engines.table_files import find_files
from rarec.data.preparation import steps
from rarec.data.preparation.inputs import missing_order_error, read_log, table_location
from rarec.errors import UserError


class UserHistory(NamedTuple):
    """The history of one user of a log.

    Attributes:
        user: the id, as in the log.
        rows: item rows in the bundle's catalogue, oldest first.
    """

    user: str | int
    rows: npt.NDArray[np.int64]


@contextmanager
def open_log(prepare: Prepare, items: Path, user: str | None = None) -> Iterator["Histories"]:
    """Open the histories of a log's users; memory does not depend on their number.

    Args:
        prepare: where the log is, its columns, and which rows are dropped (`duplicates`, `repeats`).
        items: the catalogue, Parquet with a column `item_id`; the row of an item is its place.
        user: open this user alone.

    Raises:
        UserError: the log cannot be read, or does not have that user.
    """
    with (
        tempfile.TemporaryDirectory(prefix="rarec-") as scratch,
        open_engine(prepare, Path(scratch, "spill")) as engine,
    ):
        yield Histories(prepare, engine, items, user)


class Histories:
    """The users of a log in the order of their ids, each with the history.

    Items that are not in the catalogue are left out, and users without any other.
    """

    def __init__(self, prepare: Prepare, engine: PrepareEngine, items: Path, user: str | None) -> None:
        self._prepare, self._engine = prepare, engine
        self._found = engine.keep("histories", self._read(items, user))

    def __len__(self) -> int:
        """Return the number of users."""
        return int(compute_value(self._engine, self._found.user_row.nunique()))

    def __iter__(self) -> Iterator[UserHistory]:
        """Yield the users."""
        yield from _grouped(self._engine.batches(self._found.order_by("user_row", "position").drop("position")))

    def _read(self, items: Path, user: str | None) -> ir.Table:
        log, users = self._log(user)
        catalogue = self._engine.read(find_files(str(items), "items"), {"item": "item_id"}, "items", lines=True).table
        codes = self._engine.keep("item_codes", steps.number_ids(catalogue["item"]))
        rows = catalogue.select(id="item", row=catalogue.line - 1).inner_join(codes, "id").select("code", "row")
        coded = self._engine.keep("log", steps.encode_ids(log, users, codes))
        if self._prepare.duplicates == "drop":
            coded = steps.drop_duplicates(coded)
        if self._prepare.repeats != "keep":
            coded = steps.drop_repeats(coded, self._prepare.repeats)
        named = users.mutate(row=users.code)
        found = steps.build_sequences(coded, named, self._engine.keep("item_rows", rows))
        found = found.inner_join(users.select(user_row="code", user_id="id"), "user_row")
        return found.select("user_row", "user_id", "item_row", "position")

    def _log(self, user: str | None) -> tuple[ir.Table, ir.Table]:
        """Return the raw log and the numbering of its users, or those of one user."""
        config, engine = self._prepare.interactions, self._engine
        location = table_location(config, "log")
        log = steps.drop_missing_ids(read_log(engine, config, location))
        bad = compute_value(engine, log.order.isnull().sum())
        if bad:
            raise missing_order_error(engine, config, location, bad)
        if user is not None:
            log = engine.keep("of_user", log.filter(log.user.cast("string") == user))
            if not compute_value(engine, log.count()):
                raise UserError(f"user {user!r} is not in {config.path}", f"name one of its column {config.user}")
        return log, engine.keep("user_codes", steps.number_ids(log.user))


def _grouped(batches: Iterable[pa.RecordBatch]) -> Iterator[UserHistory]:
    """Yield the rows of each user, which follow each other, as one history."""
    columns = ("user_row", "user_id", "item_row")
    lines = (line for batch in batches for line in zip(*(batch[name].to_pylist() for name in columns), strict=True))
    for (_, user), own in groupby(lines, key=lambda line: line[:2]):
        yield UserHistory(user, np.array([item for *_, item in own], np.int64))
