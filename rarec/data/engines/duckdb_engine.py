"""The DuckDB engine, which runs in this process and spills to disk, and its variant that reads tables of a database."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from rarec.data.engines.prepare_engine import (
    InputTable,
    NamedTable,
    TableLocation,
    check_columns,
    check_types,
)
from rarec.data.engines.table_files import (
    DELIMITED,
    TableFiles,
    check_gzip,
    check_parquet,
    read_header,
)
from rarec.data.tables import write_rows
from rarec.errors import UserError

DATABASE = "given"
"""Alias of the user's attached database."""
JSON_INTEGERS = ("UBIGINT", "BIGINT", "HUGEINT")
"""DuckDB's integer types of JSON values; read as text, because they may exceed 64 bits."""
COMPUTING = (
    "the preparation failed",
    "repair or rewrite the file if one is named; else raise prepare.memory, or free space in prepare.scratch",
)
"""Problem and remedy of an error during computation: no memory, no disk space, or a file that changed."""


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
            with _explained("prepare.memory", "write it like 8GB"):
                self._execute(f"SET memory_limit = {_quoted(memory)}")
        if database is not None:
            with _explained(f"prepare.engine: {database}", "name a DuckDB file: duckdb:///path/to/file"):
                self._execute(f"ATTACH {_quoted(database)} AS {DATABASE} (READ_ONLY)")

    def read(
        self, location: TableLocation, roles: Mapping[str, str], section: str, *, lines: bool = False
    ) -> InputTable:
        """See `PrepareEngine`. Parquet and database tables are scanned in place; other formats are copied first."""
        with _readable(location):
            if isinstance(location, TableFiles):
                check_gzip(location)
            source = self._scan(location, section)
            check_columns(source.columns, roles, location, section)
            if isinstance(location, TableFiles) and location.format == "parquet":
                check_parquet(location, roles.values(), pages=True)
            select = [f"{source.columns[name]} AS {_identifier(role)}" for role, name in roles.items()]
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
        with _explained(*COMPUTING):
            return self._keep(name, _sql(expression))

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """See `PrepareEngine`."""
        with _explained(*COMPUTING):
            table = self._stream(expression).read_all()
        # DuckDB sums integers in 128 bits, which Arrow returns as decimals
        rows: list[dict[str, Any]] = table.cast(expression.schema().to_pyarrow()).to_pylist()
        return rows

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        """See `PrepareEngine`."""
        with _explained(*COMPUTING):
            yield from self._stream(expression)

    def close(self) -> None:
        """See `PrepareEngine`."""
        self._ibis.disconnect()
        shutil.rmtree(self._spill, ignore_errors=True)

    def _execute(self, sql: str) -> duckdb.DuckDBPyConnection:
        return self._duckdb.execute(sql)

    def _stream(self, expression: ir.Table) -> pa.RecordBatchReader:
        return pa.RecordBatchReader.from_stream(self._duckdb.sql(_sql(expression)))

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

    def _scan(self, location: TableLocation, section: str) -> "_Scan":
        """Find the columns of a table; only as much of the table as that needs is read.

        Raises:
            UserError: a header is missing or differs between files, or lines are not JSON objects.
        """
        if isinstance(location, NamedTable):
            if self._database is None:
                remedy = "use prepare.engine: duckdb:///path/to/file, or another database, or set a path"
                raise UserError(f"{section}.table: {location.table}: the engine duckdb has no named tables", remedy)
            schema, _, name = location.table.rpartition(".")
            return self._columnar(".".join(_identifier(part) for part in (DATABASE, schema or "main", name)))
        protocol = location.paths[0].partition("://")[0]
        if location.system is not None and protocol not in self._systems:
            self._duckdb.register_filesystem(location.system)
            self._systems.add(protocol)
        if location.format in DELIMITED:
            return _delimited(location)
        if location.format == "jsonl":
            return self._jsonl(location)
        options = "hive_partitioning=false, binary_as_string=true"
        return self._columnar(f"read_parquet({_paths(location)}, {options})")

    def _columnar(self, relation: str) -> "_Scan":
        described = self._execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        return _Scan(relation, {name: _native(name, kind) for name, kind, *_ in described}, columnar=True)

    def _jsonl(self, files: TableFiles) -> "_Scan":
        relation = f"read_ndjson_objects({_paths(files)})"
        twice = "CASE WHEN len(json_keys(json)) > len(list_distinct(json_keys(json))) THEN json END"
        query = f"SELECT json_group_structure(json), any_value({twice}) FROM {relation}"
        structure, double = self._execute(query).fetchall()[0]
        kinds = json.loads(structure or "{}")
        if not isinstance(kinds, dict):
            raise UserError(f"{files.name} has lines that are not JSON objects", "write one {...} per line")
        if double is not None:
            problem = f"{files.name} has a line with two fields of one name: {str(double)[:200]}"
            raise UserError(problem, "give each field its own name")
        return _Scan(
            relation,
            {name: _json_value(name, kind) for name, kind in kinds.items()},
            frozenset(name for name, kind in kinds.items() if kind in JSON_INTEGERS),
            {name: content for name, kind in kinds.items() if (content := _unfit(kind))},
        )


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
        schema, _, name = location.table.rpartition(".")
        try:
            table = self._source.table(name, database=schema or None)
            check_columns(table.columns, roles, location, section)
            table = table.select(*dict.fromkeys(roles.values()))
            copied = self._copy(table.order_by(*table.columns) if lines else table, section)
        except UserError:
            raise
        except Exception as error:  # every driver has its own exceptions
            problem = f"{section}: {location.name}: {self._scheme} raised {type(error).__name__}: {error}"
            remedy = "check that the table exists (NAME or SCHEMA.NAME) and that you may read it"
            raise UserError(problem, remedy) from None
        return super().read(copied, roles, section, lines=lines)

    def close(self) -> None:
        """See `PrepareEngine`."""
        super().close()
        if hasattr(self, "_source"):
            self._source.disconnect()

    def _copy(self, table: ir.Table, section: str) -> TableFiles:
        """Copy the columns to Parquet in the scratch directory."""
        self._spill.mkdir(parents=True, exist_ok=True)
        path = self._spill / f"{section}.parquet"
        write_rows(table.to_pyarrow_batches(), path, table.schema().to_pyarrow())
        return TableFiles(section, (str(path),), "parquet")


@dataclass(frozen=True)
class _Scan:
    """The relation to select from, and the SQL expression of each column by its name in the table."""

    relation: str
    columns: dict[str, str]
    untyped: frozenset[str] = frozenset()
    """Columns read as text that may represent numbers."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Columns whose values are no ids and no times, with what they are."""
    columnar: bool = False
    """True if single columns are cheap to read, so that the table need not be copied."""


def _delimited(files: TableFiles) -> _Scan:
    names = read_header(files)
    delimiter, quote = DELIMITED[files.format]
    # by position: to DuckDB, `Item` and `item` are the same name
    types = ", ".join(f"c{index}: 'VARCHAR'" for index in range(len(names)))
    options = f"delim={_quoted(delimiter)}, quote={_quoted(quote)}, escape={_quoted(quote)}, columns={{{types}}}"
    relation = f"read_csv({_paths(files)}, auto_detect=false, header=true, {options})"
    return _Scan(relation, {name: f"c{index}" for index, name in enumerate(names)}, frozenset(names))


def _unfit(kind: Any) -> str | None:
    """Return what a JSON column holds, if it holds neither text nor numbers alone."""
    if isinstance(kind, str):
        return {"JSON": "values of several types", "BOOLEAN": "truth values"}.get(kind)
    return "objects" if isinstance(kind, dict) else "lists"


def _json_value(name: str, kind: Any) -> str:
    text = f"(json ->> {_quoted('/' + name.replace('~', '~0').replace('/', '~1'))})"
    return f"CAST({text} AS DOUBLE)" if kind == "DOUBLE" else text


def _native(name: str, kind: str) -> str:
    """Return a column's SQL; timestamps in nanoseconds, which pandas writes, are reduced to microseconds."""
    coarser = {"TIMESTAMP_NS": "TIMESTAMP", "TIMESTAMPTZ_NS": "TIMESTAMPTZ"}
    return f"CAST({_identifier(name)} AS {coarser[kind]})" if kind in coarser else _identifier(name)


def _quoted(text: str) -> str:
    """Return a SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _paths(files: TableFiles) -> str:
    # escaped: DuckDB would read local file names as patterns
    paths = files.paths if files.system else [re.sub(r"([\[*?])", r"[\1]", path) for path in files.paths]
    return "[" + ", ".join(map(_quoted, paths)) + "]"


def _sql(expression: ir.Table) -> str:
    return str(ibis.to_sql(expression, dialect="duckdb"))


@contextmanager
def _explained(task: str, remedy: str) -> Iterator[None]:
    """Turn an error of DuckDB into a `UserError`."""
    try:
        yield
    except duckdb.Error as error:
        raise UserError(f"{task}: {error}", remedy) from None


@contextmanager
def _readable(location: TableLocation) -> Iterator[None]:
    """Turn a DuckDB error about a table into a `UserError` that names the file and the line."""
    try:
        yield
    except duckdb.Error as error:
        text = re.split(r"\n\s*Possible|\n\s*file = ", str(error))[0]
        file = re.search(r"file = (.+)", str(error))
        name = file[1].strip() if file else location.name
        problem = re.sub(r"^[A-Za-z ]+Error: ", "", text).strip().replace("\n", "; ")
        raise UserError(f"{name} cannot be read: {problem}", "repair or remove that row, or convert the file") from None
