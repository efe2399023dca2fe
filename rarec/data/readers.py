"""Read a table on embedded DuckDB, whatever the file format, into one plain form that later steps are written for.

Every id arrives as its own text and, where the file has numbers in that column, is typed `int64`:

- Parquet and JSONL say themselves what is a number; a float column counts as integers where every value is whole.
- CSV, TSV and RecBole files hold text only: a column is integers when *every* value is a canonical one (`7`, `-3`;
  not `007`, `+7` or `7.0`), otherwise all of it stays text, so that `007` never becomes `7`.

Text columns arrive as text; the column of the order keeps its type where that is a number, and is text otherwise.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarec.data.files import Files
from rarec.errors import UserError

Query = Callable[[str], list[tuple[Any, ...]]]
"""Runs SQL on the engine and returns its rows."""

INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT"}
FLOATS = {"FLOAT", "DOUBLE"}


@dataclass(frozen=True)
class Column:
    """One column as the file has it."""

    sql: str
    """Its value."""
    text: bool
    """Whether the file says that it is text, so that digits in it are no numbers."""
    number: bool = False
    """Whether `sql` gives a number."""

    @property
    def as_text(self) -> str:
        """SQL of the value as text; a whole float is written as the integer it stands for, an empty text is null."""
        plain = f"CAST({self.sql} AS VARCHAR)"
        if not self.number:
            return f"nullif({plain}, '')"
        whole = f"{self.sql} = trunc({self.sql}) AND abs({self.sql}) < 1e15"
        return f"CASE WHEN {whole} THEN CAST(CAST({self.sql} AS BIGINT) AS VARCHAR) ELSE nullif({plain}, 'nan') END"


@dataclass(frozen=True)
class Source:
    """A table as the engine can scan it: what to select from, and its columns by their names in the file."""

    relation: str
    columns: dict[str, Column]


def open_source(files: Files, query: Query) -> Source:
    """Find out the columns of a table, reading no more of it than that takes.

    Raises:
        UserError: a header is missing, or differs between files.
    """
    match files.format:
        case "csv":
            return _delimited(files, ",", '"')
        case "tsv":
            return _delimited(files, "\t", '"')
        case "recbole":
            return _delimited(files, "\t", "")
        case "jsonl":
            return _jsonl(files, query)
    return _parquet(files, query)


def quoted(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def _list(files: Files) -> str:
    return "[" + ", ".join(quoted(str(path)) for path in files.paths) + "]"


def _delimited(files: Files, delimiter: str, quote: str) -> Source:
    """CSV and its kin. The header is read here and nothing is sniffed: every file is taken the same way."""
    header = _header(files.paths[0], delimiter, quote)
    for path in files.paths[1:]:
        other = _header(path, delimiter, quote)
        if other != header:
            raise UserError(
                f"{path} has the columns {', '.join(other)}, but {files.paths[0]} has {', '.join(header)}",
                "the files of one table need one header",
            )
    # by position: DuckDB takes `Item` and `item` for one name
    types = ", ".join(f"c{index}: 'VARCHAR'" for index in range(len(header)))
    options = f"delim={quoted(delimiter)}, quote={quoted(quote)}, escape={quoted(quote)}, columns={{{types}}}"
    relation = f"read_csv({_list(files)}, auto_detect=false, header=true, {options})"
    names = [name.rpartition(":")[0] or name for name in header] if files.format == "recbole" else header
    return Source(relation, {name: Column(f"c{index}", text=False) for index, name in enumerate(names)})


def _header(path: Path, delimiter: str, quote: str) -> list[str]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    style = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
            names = next(csv.reader(file, delimiter=delimiter, **style), [])
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}", "make the file again") from None
    if any("\ufffd" in name for name in names):
        raise UserError(f"{path}, row 1: the header is not UTF-8 text", "save the file as UTF-8")
    if not any(name.strip() for name in names):
        raise UserError(f"{path} has no header in its first row", "put the names of the columns there")
    return [name.strip() for name in names]


def _jsonl(files: Files, query: Query) -> Source:
    relation = f"read_ndjson_objects({_list(files)})"
    structure = json.loads(query(f"SELECT json_group_structure(json) FROM {relation}")[0][0] or "{}")
    if not isinstance(structure, dict):
        raise UserError(f"{files.name} holds lines that are no JSON objects", "write one {...} a line")
    pointers = {name: "/" + name.replace("~", "~0").replace("/", "~1") for name in structure}
    text = {name: kind in ("VARCHAR", "JSON") for name, kind in structure.items()}
    columns = {name: Column(f"(json ->> {quoted(pointers[name])})", text=text[name]) for name in structure}
    return Source(relation, columns)


def _parquet(files: Files, query: Query) -> Source:
    relation = f"read_parquet({_list(files)}, union_by_name=true, hive_partitioning=false, binary_as_string=true)"
    described = query(f"DESCRIBE SELECT * FROM {relation}")
    return Source(relation, {name: _parquet_column(name, kind) for name, kind, *_ in described})


def _parquet_column(name: str, kind: str) -> Column:
    identifier = '"' + name.replace('"', '""') + '"'
    number = kind in INTEGERS or kind in FLOATS or kind.startswith("DECIMAL")
    return Column(identifier, text=kind == "VARCHAR", number=number)
