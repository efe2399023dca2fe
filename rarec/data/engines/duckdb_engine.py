"""The embedded engine: DuckDB in this process, out of core: it spills to a directory when memory runs short."""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.data.engines.base import InputTable, NamedTable, TableLocation, check_columns, display_name, raise_if_nested
from rarec.data.engines.duckdb_scan import DATABASE, identifier, quoted, scan
from rarec.data.engines.table_files import TableFiles, check_parquet_columns
from rarec.errors import UserError


class DuckDBEngine:
    """DuckDB.

    Args:
        spill: a directory of its own, made when needed and removed in the end.
        memory: most that it takes, such as `8GB`; 80% of the machine's by default.
        database: a DuckDB file whose tables may be read by name.

    Raises:
        UserError: the memory is no amount, or the database cannot be opened.
    """

    def __init__(self, spill: Path, memory: str | None = None, database: str | None = None) -> None:
        self._spill, self._database = spill, database
        spill.parent.mkdir(parents=True, exist_ok=True)
        self._ibis = ibis.duckdb.connect(temp_directory=str(spill), autoinstall_known_extensions=False)
        self._duckdb: duckdb.DuckDBPyConnection = self._ibis.con
        self._execute("SET TimeZone = 'UTC'; SET preserve_insertion_order = false")
        self._kept: dict[str, int] = {}
        self._systems: set[str] = set()
        if memory is not None:
            with _told("prepare.memory", "write it as in 8GB"):
                self._execute(f"SET memory_limit = {quoted(memory)}")
        if database is not None:
            with _told(f"prepare.engine: {database}", "name a DuckDB file: duckdb:///path/to/file"):
                self._execute(f"ATTACH {quoted(database)} AS {DATABASE} (READ_ONLY)")

    def read(
        self, location: TableLocation, roles: Mapping[str, str], section: str, *, lines: bool = False
    ) -> InputTable:
        """See `PrepareEngine`. Columns of Parquet and of tables are read where they lie; others are kept."""
        if isinstance(location, NamedTable) and self._database is None:
            problem = f"{section}.table: {location.name}: the engine duckdb alone has no tables"
            raise UserError(problem, "use prepare.engine: duckdb:///path/to/file, or another, or name a path")
        with _readable(location):
            if isinstance(location, TableFiles) and location.system is not None:
                self._register(location)
            source = scan(location, self._query)
            check_columns(source.columns, roles, location, section)
            if isinstance(location, TableFiles) and location.format == "parquet":
                check_parquet_columns(location, roles.values())
            select = [f"{source.columns[name]} AS {identifier(role)}" for role, name in roles.items()]
            if lines:
                # the order of a scan is then the order of the rows in the files
                self._execute("SET preserve_insertion_order = true")
                order = f"ORDER BY {', '.join(source.columns[name] for name in roles.values())}"
                select.insert(0, f"row_number() OVER ({order if isinstance(location, NamedTable) else ''}) AS line")
            made = f"SELECT {', '.join(select)} FROM {source.relation}"
            name = section.rpartition(".")[2]
            table = self._view(name, made) if source.columnar and not lines else self._keep(name, made)
            self._execute("SET preserve_insertion_order = false")
        raise_if_nested(table, roles, location, section)
        return InputTable(table, frozenset(role for role, name in roles.items() if name in source.untyped))

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """See `PrepareEngine`."""
        with _computing():
            return self._keep(name, _sql(expression))

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """See `PrepareEngine`."""
        with _computing():
            found = self._stream(expression).read_all()
        # DuckDB sums integers to 128 bits, which arrive as decimals
        rows: list[dict[str, Any]] = found.cast(expression.schema().to_pyarrow()).to_pylist()
        return rows

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        """See `PrepareEngine`."""
        with _computing():
            yield from self._stream(expression)

    def close(self) -> None:
        """See `PrepareEngine`."""
        self._ibis.disconnect()
        shutil.rmtree(self._spill, ignore_errors=True)

    def _execute(self, sql: str) -> None:
        self._duckdb.execute(sql)

    def _query(self, sql: str) -> list[tuple[Any, ...]]:
        return self._duckdb.execute(sql).fetchall()

    def _stream(self, expression: ir.Table) -> pa.RecordBatchReader:
        return pa.RecordBatchReader.from_stream(self._duckdb.sql(_sql(expression)))

    def _register(self, files: TableFiles) -> None:
        """Let DuckDB read through fsspec."""
        protocol = files.paths[0].partition("://")[0]
        if protocol not in self._systems:
            self._duckdb.register_filesystem(files.system)
            self._systems.add(protocol)

    def _view(self, name: str, sql: str) -> ir.Table:
        self._execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {sql}")
        return self._table(name)

    def _keep(self, name: str, sql: str) -> ir.Table:
        number = self._kept.get(name, 0)
        self._execute(f"CREATE TEMP TABLE {name}_{number + 1} AS {sql}")
        if number:
            self._execute(f"DROP TABLE {name}_{number}")
        self._kept[name] = number + 1
        return self._table(f"{name}_{number + 1}")

    def _table(self, name: str) -> ir.Table:
        table: ir.Table = self._ibis.table(name, database=("temp", "main"))
        return table


class DatabaseEngine(DuckDBEngine):
    """DuckDB, fed by a connection of Ibis.

    Args:
        url: as `ibis.connect` takes it.
        spill: see `DuckDBEngine`.
        memory: see `DuckDBEngine`.

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

    def read(
        self, location: TableLocation, roles: Mapping[str, str], section: str, *, lines: bool = False
    ) -> InputTable:
        """See `PrepareEngine`. Rows of a database have no order: where lines are asked for, they follow the columns."""
        if not isinstance(location, NamedTable):
            return super().read(location, roles, section, lines=lines)
        schema, _, name = location.name.rpartition(".")
        try:
            table = self._source.table(name, database=schema or None)
            check_columns(table.columns, roles, location, section)
            table = table.select(*dict.fromkeys(roles.values()))
            copied = self._copy(table.order_by(*table.columns) if lines else table, section)
        except UserError:
            raise
        except Exception as error:  # every driver raises of its own kind
            problem = f"{section}: {display_name(location)}: {self._scheme} says {type(error).__name__}: {error}"
            raise UserError(problem, "is it there, as NAME or SCHEMA.NAME, and may you read it?") from None
        return super().read(copied, roles, section, lines=lines)

    def close(self) -> None:
        """See `PrepareEngine`."""
        super().close()
        if hasattr(self, "_source"):
            self._source.disconnect()

    def _copy(self, table: ir.Table, section: str) -> TableFiles:
        """The columns as Parquet in the spill directory."""
        self._spill.mkdir(parents=True, exist_ok=True)
        path, schema = self._spill / f"{section}.parquet", table.schema().to_pyarrow()
        with pq.ParquetWriter(path, schema) as writer:
            for batch in table.to_pyarrow_batches():
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))
        return TableFiles(section, (str(path),), "parquet")


def _sql(expression: ir.Table) -> str:
    return str(ibis.to_sql(expression, dialect="duckdb"))


@contextmanager
def _told(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise UserError(f"{what}: {error}", remedy) from None


@contextmanager
def _computing() -> Iterator[None]:
    """What can go wrong after a table was opened: it is torn farther down, or memory and disk do not suffice."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"the preparation ran out of memory: {error}", "raise prepare.memory, or use fewer threads"
        ) from None
    except duckdb.Error as error:
        remedy = "mend the file that it names, or convert it again; is there room in prepare.scratch?"
        raise UserError(f"the preparation failed: {error}", remedy) from None


@contextmanager
def _readable(location: TableLocation) -> Iterator[None]:
    """Turn the engine's complaint about a table into one that names the file and the line."""
    try:
        yield
    except duckdb.Error as error:
        text = re.split(r"\n\s*Possible|\n\s*file = ", str(error))[0]
        where = re.search(r"file = (.+)", str(error))
        name = where[1].strip() if where else display_name(location)
        problem = re.sub(r"^[A-Za-z ]+Error: ", "", text).strip().replace("\n", "; ")
        raise UserError(f"{name} cannot be read: {problem}", "mend or remove that row, or convert the file") from None
