"""Scan a table of each format with DuckDB."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rarec.data.engines.prepare_engine import MIXED, NamedTable, TableLocation, display_name
from rarec.data.engines.table_files import DELIMITED, TableFiles, read_header
from rarec.errors import UserError

Query = Callable[[str], list[tuple[Any, ...]]]
"""Run SQL on the engine and return its rows."""

DATABASE = "given"
"""Alias of the user's attached database."""
JSON_INTEGERS = ("UBIGINT", "BIGINT", "HUGEINT")
"""DuckDB's integer types of JSON values; read as text, because they may exceed 64 bits."""


@dataclass(frozen=True)
class Scan:
    """The relation to select from, and the SQL expression of each column by its name in the table."""

    relation: str
    columns: dict[str, str]
    untyped: frozenset[str] = frozenset()
    """Columns read as text that may represent numbers."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Columns whose values are no ids and no times, with what they are."""
    columnar: bool = False
    """True if single columns are cheap to read, so that the table need not be copied."""


def scan(location: TableLocation, query: Query) -> Scan:
    """Find the columns of a table; only as much of the table as that needs is read.

    Raises:
        UserError: a header is missing or differs between files, or lines are not JSON objects.
    """
    if isinstance(location, NamedTable):
        schema, _, name = location.name.rpartition(".")
        return _columnar(".".join(identifier(part) for part in (DATABASE, schema or "main", name)), query)
    if location.format in DELIMITED:
        return _delimited(location)
    if location.format == "jsonl":
        return _jsonl(location, query)
    options = "hive_partitioning=false, binary_as_string=true"
    return _columnar(f"read_parquet({_list(location)}, {options})", query)


def quoted(text: str) -> str:
    """Return a SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """Return a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _list(files: TableFiles) -> str:
    # escaped: DuckDB would read local file names as patterns
    paths = files.paths if files.system else [re.sub(r"([\[*?])", r"[\1]", path) for path in files.paths]
    return "[" + ", ".join(quoted(path) for path in paths) + "]"


def _delimited(files: TableFiles) -> Scan:
    names, dialect = read_header(files), DELIMITED[files.format]
    # by position: to DuckDB, `Item` and `item` are the same name
    types = ", ".join(f"c{index}: 'VARCHAR'" for index in range(len(names)))
    quote = quoted(dialect.quote)
    options = f"delim={quoted(dialect.delimiter)}, quote={quote}, escape={quote}, columns={{{types}}}"
    relation = f"read_csv({_list(files)}, auto_detect=false, header=true, {options})"
    return Scan(relation, {name: f"c{index}" for index, name in enumerate(names)}, frozenset(names))


def _jsonl(files: TableFiles, query: Query) -> Scan:
    relation = f"read_ndjson_objects({_list(files)})"
    twice = "CASE WHEN len(json_keys(json)) > len(list_distinct(json_keys(json))) THEN json END"
    shape, double = query(f"SELECT json_group_structure(json), any_value({twice}) FROM {relation}")[0]
    structure = json.loads(shape or "{}")
    if not isinstance(structure, dict):
        raise UserError(f"{display_name(files)} has lines that are not JSON objects", "write one {...} per line")
    if double is not None:
        problem = f"{display_name(files)} has a line with two fields of one name: {str(double)[:200]}"
        raise UserError(problem, "give each field its own name")
    columns = {name: _json_value(name, kind) for name, kind in structure.items()}
    unfit = {name: what for name, kind in structure.items() if (what := _unfit(kind))}
    return Scan(relation, columns, frozenset(name for name, kind in structure.items() if kind in JSON_INTEGERS), unfit)


def _unfit(kind: Any) -> str | None:
    """Return what a JSON column holds, if it holds neither text nor numbers alone."""
    if isinstance(kind, str):
        return {"JSON": MIXED, "BOOLEAN": "truth values"}.get(kind)
    return "objects" if isinstance(kind, dict) else "lists"


def _json_value(name: str, kind: Any) -> str:
    text = f"(json ->> {quoted('/' + name.replace('~', '~0').replace('/', '~1'))})"
    return f"CAST({text} AS DOUBLE)" if kind == "DOUBLE" else text


def _columnar(relation: str, query: Query) -> Scan:
    described = query(f"DESCRIBE SELECT * FROM {relation}")
    return Scan(relation, {name: _native(name, kind) for name, kind, *_ in described}, columnar=True)


def _native(name: str, kind: str) -> str:
    """Return a column's SQL; timestamps in nanoseconds, which pandas writes, are reduced to microseconds."""
    to = {"TIMESTAMP_NS": "TIMESTAMP", "TIMESTAMPTZ_NS": "TIMESTAMPTZ"}
    return f"CAST({identifier(name)} AS {to[kind]})" if kind in to else identifier(name)
