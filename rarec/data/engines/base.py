"""What the preparation asks of an engine. Its steps are Ibis expressions and know no more than this."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ibis.expr.types as ir
import pyarrow as pa

from rarec.data.engines.table_files import TableFiles
from rarec.errors import UserError


@dataclass(frozen=True)
class NamedTable:
    """A table that the engine has under a name."""

    name: str


TableLocation = TableFiles | NamedTable
"""Where a table lies."""


@dataclass(frozen=True)
class InputTable:
    """Columns of a table as it has them.

    Attributes:
        table: one column for each role, of the type that the file gives; with `line` (from 1, in the order of the
            files), where it was asked for.
        untyped: the roles whose text may stand for numbers: CSV and its kin hold nothing else.
    """

    table: ir.Table
    untyped: frozenset[str] = frozenset()


class PrepareEngine(Protocol):
    """Reads tables, keeps intermediate results, and streams expressions out."""

    def read(
        self, location: TableLocation, roles: Mapping[str, str], section: str, *, lines: bool = False
    ) -> InputTable:
        """Read columns of a table.

        Args:
            location: the table.
            roles: each column's name in the table, by the role it plays.
            section: the configuration's section, for messages.
            lines: number the rows: of files in their order, of a table, which has none, by these columns.

        Raises:
            UserError: a column is missing, or something cannot be read (found now, or when rows are asked for).
        """

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """Compute an expression and keep its rows under a name; what the name held before is given up."""

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """Compute a table that is known to be small."""

    def batches(self, expression: ir.Table) -> Iterable[pa.RecordBatch]:
        """Stream an expression's rows in its order; to be read to the end before the engine is asked anything else."""

    def close(self) -> None:
        """Give up everything kept."""


def compute_value(engine: PrepareEngine, scalar: ir.Scalar) -> Any:
    """Compute one value."""
    return engine.rows(scalar.name("value").as_table())[0]["value"]


def display_name(location: TableLocation) -> str:
    """What an error message calls a table."""
    return location.name if isinstance(location, TableFiles) else f"table {location.name}"


def check_columns(columns: Iterable[str], roles: Mapping[str, str], location: TableLocation, section: str) -> None:
    """Refuse a role whose column is missing, naming the nearest and those which are there."""
    columns = list(columns)
    for role, name in roles.items():
        if name in columns:
            continue
        folded = {known.casefold(): known for known in columns}
        close = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)
        hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
        field = f"{section}.{role.partition('_')[0]}"
        raise UserError(
            f"{display_name(location)} has no column {name!r} ({field}){hint}", f"its columns: {', '.join(columns)}"
        )


def raise_if_nested(table: ir.Table, roles: Mapping[str, str], location: TableLocation, section: str) -> None:
    """Refuse lists and structures: engines write them differently."""
    for role, name in roles.items():
        kind = table[role].type()
        if kind.is_nested() or kind.is_time():
            field = f"{section}.{role.partition('_')[0]}"
            raise UserError(
                f"{display_name(location)}: column {name!r} ({field}) holds {kind}", "write it as text or numbers"
            )
