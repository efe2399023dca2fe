"""Any engine that Ibis reaches by a URL, for tables that it has under a name: databases and warehouses."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from rarec.data.engines.base import Named, Place, Read, check_columns, describe
from rarec.errors import UserError


class NamedEngine:
    """A connection of Ibis. The rights it needs: to read the tables, and to make temporary ones.

    Args:
        url: as `ibis.connect` takes it.

    Raises:
        UserError: Ibis knows no such engine, its driver is not installed, or the connection is refused.
    """

    def __init__(self, url: str) -> None:
        shown = url.partition("://")[0] + "://..."  # the rest may hold a password
        try:
            self._ibis = ibis.connect(url)
        except Exception as error:  # every driver raises of its own kind
            scheme = url.partition("://")[0]
            remedy = f"pip install 'ibis-framework[{scheme}]', and check host, user, password and database"
            raise UserError(f"prepare.engine: {shown} does not connect: {type(error).__name__}: {error}", remedy) from None
        self._kept: dict[str, int] = {}

    def read(self, place: Place, roles: Mapping[str, str], section: str, *, lines: bool = False) -> Read:
        """See `Engine`. Rows of a database have no order: where lines are asked for, they follow all the columns."""
        if not isinstance(place, Named):
            raise UserError(
                f"{section}.path: this engine reads its own tables, not files ({describe(place)})",
                f"name {section}.table, or use prepare.engine: duckdb or spark",
            )
        schema, _, name = place.name.rpartition(".")
        with _told(f"{section}.table: {place.name}"):
            table = self._ibis.table(name, database=schema or None)
        check_columns(table.columns, roles, place, section)
        table = table.select(**{role: table[name] for role, name in roles.items()})
        if lines:
            table = table.mutate(line=ibis.row_number().over(ibis.window(order_by=list(roles))) + 1)
        return Read(table)

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """See `Engine`."""
        number = self._kept.get(name, 0)
        with _told(name):
            table = self._ibis.create_table(f"rarec_{name}_{number + 1}", expression, temp=True)
        self._kept[name] = number + 1
        return table

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """See `Engine`."""
        with _told("the preparation"):
            rows: list[dict[str, Any]] = expression.to_pyarrow().to_pylist()
        return rows

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        """See `Engine`."""
        with _told("the preparation"):
            yield from expression.to_pyarrow_batches()

    def close(self) -> None:
        """See `Engine`. Temporary tables go with the connection."""
        self._ibis.disconnect()


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every driver raises of its own kind
        problem = f"{what}: the engine says {type(error).__name__}: {error}"
        raise UserError(problem, "does the table exist, and may you make temporary tables?") from error
