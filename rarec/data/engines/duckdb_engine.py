"""The DuckDB engine, which runs in this process and spills to disk, and its variant that reads tables of a database."""

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

from rarec.data.engines.duckdb_scan import DATABASE, identifier, quoted, scan
from rarec.data.engines.file_checks import check_parquet_columns, raise_if_damaged
from rarec.data.engines.prepare_engine import (
    InputTable,
    NamedTable,
    TableLocation,
    check_columns,
    check_types,
    display_name,
)
from rarec.data.engines.table_files import TableFiles
from rarec.errors import UserError


class DuckDBEngine:
    """Run the preparation on DuckDB.

    Args:
        spill: scratch directory, created on demand and removed at the end.
        memory: memory limit, such as `8GB`; 80% of the machine's memory by default.
        database: DuckDB file whose tables can be read by name.

    Raises:
        UserError: the memory limit is malformed, or the database cannot be opened.
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
            with _setting("prepare.memory", "write it like 8GB"):
                self._execute(f"SET memory_limit = {quoted(memory)}")
        if database is not None:
            with _setting(f"prepare.engine: {database}", "name a DuckDB file: duckdb:///path/to/file"):
                self._execute(f"ATTACH {quoted(database)} AS {DATABASE} (READ_ONLY)")

    def read(
        self, location: TableLocation, roles: Mapping[str, str], section: str, *, lines: bool = False
    ) -> InputTable:
        """See `PrepareEngine`. Parquet and database tables are scanned in place; other formats are copied first."""
        if isinstance(location, NamedTable) and self._database is None:
            problem = f"{section}.table: {location.name}: the engine duckdb has no named tables"
            raise UserError(problem, "use prepare.engine: duckdb:///path/to/file, or another database, or set a path")
        with _readable(location):
            if isinstance(location, TableFiles) and location.system is not None:
                self._register(location)
            if isinstance(location, TableFiles) and location.format != "parquet":
                raise_if_damaged(location, ())
            source = scan(location, self._query)
            check_columns(source.columns, roles, location, section)
            if isinstance(location, TableFiles) and location.format == "parquet":
                check_parquet_columns(location, roles.values())
                raise_if_damaged(location, roles.values())
            select = [f"{source.columns[name]} AS {identifier(role)}" for role, name in roles.items()]
            if lines:
                # makes a scan return rows in file order
                self._execute("SET preserve_insertion_order = true")
                order = f"ORDER BY {', '.join(source.columns[name] for name in roles.values())}"
                select.insert(0, f"row_number() OVER ({order if isinstance(location, NamedTable) else ''}) AS line")
            query = f"SELECT {', '.join(select)} FROM {source.relation}"
            name = section.rpartition(".")[2]
            table = self._view(name, query) if source.columnar and not lines else self._keep(name, query)
            self._execute("SET preserve_insertion_order = false")
        check_types(table, roles, location, section, source.unfit)
        return InputTable(table, frozenset(role for role, name in roles.items() if name in source.untyped))

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """See `PrepareEngine`."""
        with _computing():
            return self._keep(name, _sql(expression))

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """See `PrepareEngine`."""
        with _computing():
            found = self._stream(expression).read_all()
        # DuckDB sums integers in 128 bits, which Arrow returns as decimals
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
        """Register the files' fsspec file system with DuckDB."""
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
    """Read tables of a database with Ibis, and compute on DuckDB.

    The database only needs to return columns: no write permission and no particular SQL function is required.

    Args:
        url: URL for `ibis.connect`.
        spill: see `DuckDBEngine`.
        memory: see `DuckDBEngine`.

    Raises:
        UserError: Ibis has no such backend, its driver is not installed, or the connection is refused.
    """

    def __init__(self, url: str, spill: Path, memory: str | None = None) -> None:
        super().__init__(spill, memory)
        self._scheme = url.partition("://")[0]  # the rest may contain a password: never shown
        try:
            self._source = ibis.connect(url)
        except Exception as error:  # every driver has its own exceptions
            self.close()
            remedy = f"pip install 'ibis-framework[{self._scheme}]'; check host, user, password and database"
            shown = f"{self._scheme}://..."
            message = str(error).replace(url, shown)
            raise UserError(f"prepare.engine: {shown} does not connect: {message}", remedy) from None

    def read(
        self, location: TableLocation, roles: Mapping[str, str], section: str, *, lines: bool = False
    ) -> InputTable:
        """See `PrepareEngine`. Database rows have no order: numbered rows are sorted by their columns."""
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
        except Exception as error:  # every driver has its own exceptions
            problem = f"{section}: {display_name(location)}: {self._scheme} raised {type(error).__name__}: {error}"
            raise UserError(
                problem, "check that the table exists (NAME or SCHEMA.NAME) and that you may read it"
            ) from None
        return super().read(copied, roles, section, lines=lines)

    def close(self) -> None:
        """See `PrepareEngine`."""
        super().close()
        if hasattr(self, "_source"):
            self._source.disconnect()

    def _copy(self, table: ir.Table, section: str) -> TableFiles:
        """Copy the columns to Parquet in the scratch directory."""
        self._spill.mkdir(parents=True, exist_ok=True)
        path, schema = self._spill / f"{section}.parquet", table.schema().to_pyarrow()
        with pq.ParquetWriter(path, schema) as writer:
            for batch in table.to_pyarrow_batches():
                writer.write_table(pa.Table.from_batches([batch]).cast(schema))
        return TableFiles(section, (str(path),), "parquet")


def _sql(expression: ir.Table) -> str:
    return str(ibis.to_sql(expression, dialect="duckdb"))


@contextmanager
def _setting(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise UserError(f"{what}: {error}", remedy) from None


@contextmanager
def _computing() -> Iterator[None]:
    """Turn a DuckDB error during computation (broken input, no memory, no disk space) into a `UserError`."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"the preparation ran out of memory: {error}", "raise prepare.memory, or use fewer threads"
        ) from None
    except duckdb.Error as error:
        remedy = "repair or rewrite the file named above; check that prepare.scratch has free space"
        raise UserError(f"the preparation failed: {error}", remedy) from None


@contextmanager
def _readable(location: TableLocation) -> Iterator[None]:
    """Turn a DuckDB error about a table into a `UserError` that names the file and the line."""
    try:
        yield
    except duckdb.Error as error:
        text = re.split(r"\n\s*Possible|\n\s*file = ", str(error))[0]
        where = re.search(r"file = (.+)", str(error))
        name = where[1].strip() if where else display_name(location)
        problem = re.sub(r"^[A-Za-z ]+Error: ", "", text).strip().replace("\n", "; ")
        raise UserError(f"{name} cannot be read: {problem}", "repair or remove that row, or convert the file") from None
