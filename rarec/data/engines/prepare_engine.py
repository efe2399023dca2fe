"""What the preparation needs of an engine, and the checks of columns that all engines share.

The steps of the preparation are Ibis expressions, and use nothing of an engine but `PrepareEngine`.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import ibis.expr.types as ir
import pyarrow as pa

from rarec.data.engines.table_files import NAMED, TableLocation
from rarec.errors import UserError, nearest

KEYS = ("user", "item", "time", "position")
"""Roles whose values are compared, and so must be of one type."""
ALIKE = "write it as text in every row, or as numbers in every row; in a database, a view with a CAST will do"
DATED = "name a column of timestamps, dates, ISO 8601 text or epoch numbers; in a database, a view can have one"
"""Remedies of a column whose type does not serve."""


class PrepareEngine(Protocol):
    """Read tables, keep intermediate results, and stream expressions out."""

    def read(self, location: TableLocation, roles: Mapping[str, str], *, lines: bool = False) -> ir.Table:
        """Read columns of a table.

        Args:
            location: files or a named table.
            roles: column name in the table, by role.
            lines: number the rows from 1, in the column `line`: in file order, or, for a named table, sorted by these
                columns.

        Returns:
            One column for each role.

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


def check_columns(columns: Iterable[str], roles: Mapping[str, str], location: TableLocation) -> None:
    """Check that the column of every role exists.

    Raises:
        UserError: a column is missing; the message suggests the nearest name and lists the columns.
    """
    columns = list(columns)
    for role, name in roles.items():
        if name not in columns:
            hint = nearest(name, columns, listed=False)
            problem = f"{location.name} has no column {name!r} ({location.field(role)}){hint}"
            raise UserError(problem, f"its columns: {', '.join(columns)}")


def check_types(
    table: ir.Table, roles: Mapping[str, str], location: TableLocation, mixed: Collection[str] = ()
) -> None:
    """Refuse types that are not what a role needs, or that engines write differently.

    Lists, structures, durations and times of day are refused everywhere; ids are text or numbers, and an order is not a
    truth. Types that Ibis does not know are refused too, but in a database, from which they are copied as text.

    Args:
        table: one column for each role.
        roles: column name in the table, by role.
        location: the table, for messages.
        mixed: columns of text that hold objects, lists or values of several types: no ids and no times.

    Raises:
        UserError: a column has such a type.
    """
    for role, name in roles.items():
        kind = table[role].type()
        wrong = kind.is_nested() or kind.is_time() or kind.is_interval()
        wrong = wrong or (kind.is_unknown() and location.format != NAMED)
        wrong = wrong or (role in KEYS and (kind.is_boolean() or name in mixed))
        if wrong or (role in ("user", "item") and kind.is_temporal()):
            shown = kind.raw_type if kind.is_unknown() else kind
            holds = "objects, lists or values of several types" if name in mixed else f"values of type {shown}"
            problem = f"{location.name}: column {name!r} ({location.field(role)}) holds {holds}"
            raise UserError(problem, DATED if role == "time" and name not in mixed else ALIKE)
