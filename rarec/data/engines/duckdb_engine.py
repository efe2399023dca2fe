"""The DuckDB engine, which runs in this process and spills to disk, and its variant that reads tables of a database."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from rarec.data.engines.table_checks import (
    check_columns,
    check_gzip,
    check_line_ends,
    check_parquet,
    check_types,
    read_header,
)
from rarec.data.engines.table_files import DELIMITED, NAMED, TableLocation
from rarec.data.tables import write_rows
from rarec.errors import UserError
from rarec.storage.files import make_directory

JSON_INTEGERS = ("UBIGINT", "BIGINT", "HUGEINT")
"""DuckDB's integer types of JSON values, which may exceed 64 bits."""
ROW_COLUMNS = {"file_index", "file_row_number"}
"""DuckDB's own columns of a Parquet table, unless a file has columns of these names."""
COMPUTING = (
    "the preparation failed",
    "repair or rewrite the file if one is named; else free space in prepare.scratch",
)
"""Problem and remedy of an error during computation: no disk space, or a file that changed."""


class DuckDBEngine:
    """Run the preparation on DuckDB; read files.

    Args:
        spill: scratch directory, created on demand and removed at the end.
        memory: memory limit, such as `8GB`; 80% of the machine's memory by default.

    Raises:
        UserError: the memory limit is malformed.
    """

    def __init__(self, spill: Path, memory: str | None = None) -> None:
        self._spill = spill
        make_directory(spill.parent)
        self._ibis = ibis.duckdb.connect(temp_directory=str(spill), autoinstall_known_extensions=False)
        self._duckdb: duckdb.DuckDBPyConnection = self._ibis.con
        self._duckdb.execute("SET TimeZone = 'UTC'; SET preserve_insertion_order = false")
        self._systems: set[str] = set()
        if memory is not None:
            with _explained("prepare.memory", "write it like 8GB"):
                self._duckdb.execute(f"SET memory_limit = {_quoted(memory)}")

    def read(self, location: TableLocation, roles: Mapping[str, str], *, lines: bool = False) -> ir.Table:
        """See `PrepareEngine`. Parquet is scanned in place; other formats are copied first, in their order."""
        if location.format == NAMED:
            remedy = "use prepare.engine: duckdb:///path/to/file, or another database, or set a path"
            raise UserError(f"{location.field('table')}: the engine duckdb has no {location.name}", remedy)
        with _readable(location):
            check_gzip(location)
            source = self._scan(location)
            check_columns(source.columns, roles, location)
            select = [f"{source.columns[name]} AS {_identifier(role)}" for role, name in roles.items()]
            relation, line = source.relation, "rowid + 1"
            if location.format == "parquet":
                firsts = check_parquet(location, roles.values(), pages=True)
                line = f"{firsts}[file_index::BIGINT + 1] + file_row_number"
            if location.format != "parquet" or ROW_COLUMNS.intersection(map(str.lower, source.columns)):
                relation, line = f"read_{location.short_section}", "rowid + 1"
                self._duckdb.execute(f"SET preserve_insertion_order = {lines}")
                self._create("TABLE", relation, f"SELECT {', '.join(select)} FROM {source.relation}")
                self._duckdb.execute("SET preserve_insertion_order = false")
                select = ["*"]
            select += [f"{line} AS line"] * lines
            query = f"SELECT {', '.join(select)} FROM {relation}"
            table = self._create("VIEW", f"view_{location.short_section}", query)
        check_types(table, roles, location, source.mixed)
        return table

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """See `PrepareEngine`."""
        with _explained(*COMPUTING):
            return self._create("TABLE", name, _sql(expression))

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """See `PrepareEngine`."""
        with _explained(*COMPUTING):
            table = _stream(self._duckdb, expression).read_all()
        # DuckDB sums integers in 128 bits, which Arrow returns as decimals
        rows: list[dict[str, Any]] = table.cast(expression.schema().to_pyarrow()).to_pylist()
        return rows

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        """See `PrepareEngine`."""
        with _explained(*COMPUTING):
            yield from _stream(self._duckdb, expression)

    def close(self) -> None:
        """See `PrepareEngine`."""
        self._ibis.disconnect()
        shutil.rmtree(self._spill, ignore_errors=True)

    def _create(self, kind: str, name: str, sql: str) -> ir.Table:
        self._duckdb.execute(f"CREATE OR REPLACE TEMP {kind} {name} AS {sql}")
        table: ir.Table = self._ibis.table(name, database=("temp", "main"))
        return table

    def _scan(self, files: TableLocation) -> "_Scan":
        """Find the columns of a table; only as much of the table as that needs is read.

        Raises:
            UserError: a header is missing or differs between files, or lines are not JSON objects.
        """
        protocol = files.paths[0].partition("://")[0]
        if files.system is not None and protocol not in self._systems:
            self._duckdb.register_filesystem(files.system)
            self._systems.add(protocol)
        if files.format in DELIMITED:
            return _delimited(files)
        if files.format == "jsonl":
            return self._jsonl(files)
        relation = f"read_parquet({_paths(files)}, hive_partitioning=false, binary_as_string=true)"
        described = self._duckdb.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        return _Scan(relation, {name: _native(name, kind) for name, kind, *_ in described})

    def _jsonl(self, files: TableLocation) -> "_Scan":
        relation = f"read_ndjson_objects({_paths(files)})"
        twice = "CASE WHEN len(json_keys(json)) > len(list_distinct(json_keys(json))) THEN json END"
        query = f"SELECT json_group_structure(json), any_value({twice}) FROM {relation}"
        structure, double = self._duckdb.execute(query).fetchall()[0]
        kinds = json.loads(structure or "{}")
        if not isinstance(kinds, dict):
            raise UserError(f"{files.name} has lines that are not JSON objects", "write one {...} per line")
        if double is not None:
            problem = f"{files.name} has a line with two fields of one name: {str(double)[:200]}"
            raise UserError(problem, "give each field its own name")
        mixed = frozenset(name for name, kind in kinds.items() if kind == "JSON" or not isinstance(kind, str))
        return _Scan(relation, {name: _json_value(name, kind) for name, kind in kinds.items()}, mixed)


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
        self._scheme, _, rest = url.partition("://")
        try:
            self._source = self._connect_file(rest, memory) if self._scheme == "duckdb" else ibis.connect(url)
        except Exception as error:  # every driver has its own exceptions
            self.close()
            remedy = f"pip install 'ibis-framework[{self._scheme}]'; check host, user, password and database"
            if self._scheme == "duckdb":
                remedy = "name a DuckDB file: duckdb:///path/to/file"
            raise UserError(f"prepare.engine: {url} does not connect: {error}", remedy) from None

    def _connect_file(self, path: str, memory: str | None) -> Any:
        """Connect to a DuckDB file, with the limits of this engine: sorting spills beside the engine's own files."""
        source = ibis.duckdb.connect(
            path, read_only=True, temp_directory=str(self._spill / "source"), autoinstall_known_extensions=False
        )
        if memory is not None:
            source.con.execute(f"SET memory_limit = {_quoted(memory)}")
        return source

    def read(self, location: TableLocation, roles: Mapping[str, str], *, lines: bool = False) -> ir.Table:
        """See `PrepareEngine`. Database rows have no order: numbered rows are sorted by their columns."""
        if location.format != NAMED:
            return super().read(location, roles, lines=lines)
        schema, _, name = location.path.rpartition(".")
        try:
            table = self._source.table(name, database=schema or None)
            check_columns(table.columns, roles, location)
            check_types(table.select(**roles), roles, location)
            table = table.select(*dict.fromkeys(roles.values()))
            copied = self._copy(table.order_by(*table.columns) if lines else table, location)
        except UserError:
            raise
        except Exception as error:  # every driver has its own exceptions
            _raise_if_exhausted(error)
            problem = f"{location.section}: {location.name}: {self._scheme} raised {type(error).__name__}: {error}"
            remedy = "check the table's name (NAME or SCHEMA.NAME), your right to read it, and its columns' types"
            raise UserError(problem, remedy) from None
        return super().read(copied, roles, lines=lines)

    def close(self) -> None:
        """See `PrepareEngine`."""
        super().close()
        if hasattr(self, "_source"):
            self._source.disconnect()

    def _copy(self, table: ir.Table, location: TableLocation) -> TableLocation:
        """Copy the columns to Parquet in the scratch directory."""
        make_directory(self._spill)
        path = self._spill / f"{location.section}.parquet"
        is_file = self._scheme == "duckdb"
        rows = _stream(self._source.con, table) if is_file else table.to_pyarrow_batches()
        write_rows(rows, path, table.schema().to_pyarrow())
        return TableLocation(location.section, location.path, (str(path),), "parquet")


@dataclass(frozen=True)
class _Scan:
    """The relation to select from, and the SQL expression of each column by its name in the table."""

    relation: str
    columns: dict[str, str]
    mixed: frozenset[str] = frozenset()
    """Columns read as text that hold objects, lists, or values of several types."""


def _delimited(files: TableLocation) -> _Scan:
    names = read_header(files)
    delimiter, quote = DELIMITED[files.format]
    # by position: to DuckDB, `Item` and `item` are the same name
    types = ", ".join(f"c{index}: 'VARCHAR'" for index in range(len(names)))
    options = f"delim={_quoted(delimiter)}, quote={_quoted(quote)}, escape={_quoted(quote)}, columns={{{types}}}"
    relation = f"read_csv({_paths(files)}, auto_detect=false, header=true, {options})"
    return _Scan(relation, {name: f"c{index}" for index, name in enumerate(names)})


def _json_value(name: str, kind: Any) -> str:
    text = f"(json ->> {_quoted('/' + name.replace('~', '~0').replace('/', '~1'))})"
    if kind in ("DOUBLE", "BOOLEAN"):
        return f"CAST({text} AS {kind})"
    return f"CAST({text} AS DECIMAL(38, 0))" if kind in JSON_INTEGERS else text


def _native(name: str, kind: str) -> str:
    """Return a column's SQL; timestamps in nanoseconds, which pandas writes, are reduced to microseconds."""
    coarser = {"TIMESTAMP_NS": "TIMESTAMP", "TIMESTAMPTZ_NS": "TIMESTAMPTZ"}
    return f"CAST({_identifier(name)} AS {coarser[kind]})" if kind in coarser else _identifier(name)


def _quoted(text: str) -> str:
    """Return a SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _paths(files: TableLocation) -> str:
    # escaped: DuckDB would read local file names as patterns
    paths = files.paths if files.system else [re.sub(r"([\[*?])", r"[\1]", path) for path in files.paths]
    return "[" + ", ".join(map(_quoted, paths)) + "]"


def _sql(expression: ir.Table) -> str:
    return str(ibis.to_sql(expression, dialect="duckdb"))


def _stream(connection: duckdb.DuckDBPyConnection, expression: ir.Table) -> pa.RecordBatchReader:
    return pa.RecordBatchReader.from_stream(connection.sql(_sql(expression)))


@contextmanager
def _explained(task: str, remedy: str) -> Iterator[None]:
    """Turn an error of DuckDB into a `UserError`."""
    try:
        yield
    except duckdb.Error as error:
        _raise_if_exhausted(error)
        raise UserError(f"{task}: {error}", remedy) from None


def _raise_if_exhausted(error: Exception) -> None:
    """Raise an error of its own if memory or disk space ran out, which is no fault of the table."""
    reason = str(error).partition("\n")[0].removeprefix("Out of Memory Error: ")
    if isinstance(error, duckdb.OutOfMemoryException):
        remedy = "raise prepare.memory (such as to 4GB) or leave it out, or free space in prepare.scratch"
        raise UserError(f"prepare.memory is too small: {reason}", remedy) from None
    if os.strerror(errno.EFBIG) in reason:
        raise error  # `machine_trouble` names the limit
    if os.strerror(errno.ENOSPC) in reason or os.strerror(errno.EDQUOT) in reason:
        remedy = "free space there, or set prepare.scratch to a folder on a larger disk"
        raise UserError(f"the disk of prepare.scratch is full: {reason}", remedy) from None


@contextmanager
def _readable(location: TableLocation) -> Iterator[None]:
    """Turn a DuckDB error about a table into a `UserError` that names the file and the line."""
    try:
        yield
    except duckdb.Error as error:
        _raise_if_exhausted(error)
        if "invalid state" in str(error):
            check_line_ends(location)
        text = re.split(r"\n\s*Possible|\n\s*file = ", str(error))[0]
        file = re.search(r"file = (.+)", str(error))
        name = file[1].strip() if file else location.name
        problem = re.sub(r"^[A-Za-z ]+Error: ", "", text).strip().replace("\n", "; ")
        raise UserError(f"{name} cannot be read: {problem}", "repair or remove that row, or convert the file") from None
