"""The interface between the preparation and its engines: the steps are Ibis expressions and use nothing else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ibis.expr.types as ir
import pyarrow as pa

from rarec.data.engines.table_files import TableFiles
from rarec.errors import UserError, nearest


@dataclass(frozen=True)
class NamedTable:
    """A table of a database, as `NAME` or `SCHEMA.NAME`."""

    table: str

    @property
    def name(self) -> str:
        """The name in messages."""
        return f"table {self.table}"


KEYS = ("user", "item", "time", "position")
"""Roles whose values are compared, and so must be of one type."""
TableLocation = TableFiles | NamedTable
"""Location of an input table: files, or a table of a database."""


@dataclass(frozen=True)
class InputTable:
    """Columns of an input table, with the types of its source.

    Attributes:
        table: one column for each role; also `line` (from 1, in the order of the files) where it was requested.
        untyped: roles whose text may represent numbers, because the format (CSV and the like) has text only.
    """

    table: ir.Table
    untyped: frozenset[str] = frozenset()


class PrepareEngine(Protocol):
    """Read tables, keep intermediate results, and stream expressions out."""

    def read(
        self, location: TableLocation, roles: Mapping[str, str], section: str, *, lines: bool = False
    ) -> InputTable:
        """Read columns of a table.

        Args:
            location: files or a named table.
            roles: column name in the table, by role.
            section: section of the configuration, for messages.
            lines: number the rows: in file order, or, for a named table, sorted by these columns.

        Raises:
            UserError: a column is missing or the table cannot be read (raised now, or when rows are fetched).
        """

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """Compute an expression and store its rows under a name, replacing what the name held before."""

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """Compute a small table and return its rows."""

    def batches(self, expression: ir.Table) -> Iterable[pa.RecordBatch]:
        """Stream the rows of an expression in its order.

        Read the stream to its end before using the engine again.
        """

    def close(self) -> None:
        """Release everything that was kept."""


def compute_value(engine: PrepareEngine, scalar: ir.Scalar) -> Any:
    """Compute a scalar expression."""
    return engine.rows(scalar.name("value").as_table())[0]["value"]


def check_columns(columns: Iterable[str], roles: Mapping[str, str], location: TableLocation, section: str) -> None:
    """Check that the column of every role exists.

    Raises:
        UserError: a column is missing; the message suggests the nearest name and lists the columns.
    """
    columns = list(columns)
    for role, name in roles.items():
        if name not in columns:
            hint = nearest(name, columns, listed=False)
            problem = f"{location.name} has no column {name!r} ({_field(section, role)}){hint}"
            raise UserError(problem, f"its columns: {', '.join(columns)}")


def check_types(
    table: ir.Table, roles: Mapping[str, str], location: TableLocation, section: str, unfit: Mapping[str, str]
) -> None:
    """Refuse types that are not what a role needs, or that engines write differently.

    Lists, structures and times of day are refused everywhere; ids are text or numbers, and an order is not a truth.

    Args:
        table: one column for each role.
        roles: column name in the table, by role.
        location: the table, for messages.
        section: section of the configuration, for messages.
        unfit: what a column holds that can be shown as text, but is no id and no time, by its name in the table.

    Raises:
        UserError: a column has such a type.
    """
    for role, name in roles.items():
        kind = table[role].type()
        wrong = kind.is_nested() or kind.is_time()
        if role in ("user", "item"):
            wrong = wrong or kind.is_boolean() or kind.is_temporal()
        elif role in ("time", "position"):
            wrong = wrong or kind.is_boolean()
        content = unfit.get(name) if role in KEYS else None
        if wrong or content:
            content = content or f"values of type {kind}"
            problem = f"{location.name}: column {name!r} ({_field(section, role)}) holds {content}"
            raise UserError(problem, "write it as text in every row, or as numbers in every row")


def _field(section: str, role: str) -> str:
    return f"{section}.{role.partition('_')[0]}"
