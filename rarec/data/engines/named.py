"""Tables of any database or warehouse that Ibis reaches by a URL: read there, computed on embedded DuckDB.

Of the database nothing is asked but to give the columns: no right to write, and no function that it may lack.
"""

from collections.abc import Mapping
from pathlib import Path

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.data.engines.base import Named, Place, Read, check_columns, describe
from rarec.data.engines.embedded import EmbeddedEngine
from rarec.data.engines.files import Files
from rarec.errors import UserError


class NamedEngine(EmbeddedEngine):
    """DuckDB, fed by a connection of Ibis.

    Args:
        url: as `ibis.connect` takes it.
        spill: see `EmbeddedEngine`.
        memory: see `EmbeddedEngine`.

    Raises:
        UserError: Ibis knows no such engine, its driver is not installed, or the connection is refused.
    """

    def __init__(self, url: str, spill: Path, memory: str | None = None) -> None:
        super().__init__(spill, memory)
        self._scheme = url.partition("://")[0]  # what follows may hold a password: it is not shown
        try:
            self._source = ibis.connect(url)
        except Exception as error:  # every driver raises of its own kind
            self.close()
            remedy = f"pip install 'ibis-framework[{self._scheme}]'; check host, user, password and database"
            shown = f"{self._scheme}://..."
            said = str(error).replace(url, shown)
            raise UserError(f"prepare.engine: {shown} does not connect: {said}", remedy) from None

    def read(self, place: Place, roles: Mapping[str, str], section: str, *, lines: bool = False) -> Read:
        """See `Engine`. Rows of a database have no order: where lines are asked for, they follow the columns."""
        if not isinstance(place, Named):
            return super().read(place, roles, section, lines=lines)
        schema, _, name = place.name.rpartition(".")
        try:
            table = self._source.table(name, database=schema or None)
            check_columns(table.columns, roles, place, section)
            table = table.select(*dict.fromkeys(roles.values()))
            copied = self._copy(table.order_by(*table.columns) if lines else table, section)
        except UserError:
            raise
        except Exception as error:  # every driver raises of its own kind
            problem = f"{section}: {describe(place)}: {self._scheme} says {type(error).__name__}: {error}"
            raise UserError(problem, "is it there, as NAME or SCHEMA.NAME, and may you read it?") from None
        return super().read(copied, roles, section, lines=lines)

    def close(self) -> None:
        """See `Engine`."""
        super().close()
        if hasattr(self, "_source"):
            self._source.disconnect()

    def _copy(self, table: ir.Table, section: str) -> Files:
        """The columns as Parquet in the spill directory."""
        self._spill.mkdir(parents=True, exist_ok=True)
        path, schema = self._spill / f"{section}.parquet", table.schema().to_pyarrow()
        with pq.ParquetWriter(path, schema) as writer:
            for batch in table.to_pyarrow_batches():
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))
        return Files(section, (str(path),), "parquet")
