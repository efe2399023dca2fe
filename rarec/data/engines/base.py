"""What the preparation asks of an engine. Its steps are Ibis expressions and know no more than this."""

import csv
import difflib
import gzip
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import fsspec
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.data.engines.files import Files
from rarec.errors import UserError

FOOTERS = 16
"""Parquet files looked at together."""


@dataclass(frozen=True)
class Named:
    """A table that the engine has under a name."""

    name: str


Place = Files | Named
"""Where a table lies."""


@dataclass(frozen=True)
class Read:
    """Columns of a table as it has them.

    Attributes:
        table: one column for each role, of the type that the file gives; with `line` (from 1, in the order of the
            files), where it was asked for.
        untyped: the roles whose text may stand for numbers: CSV and its kin hold nothing else.
    """

    table: ir.Table
    untyped: frozenset[str] = frozenset()


class Engine(Protocol):
    """Reads tables, keeps intermediate results, and streams expressions out."""

    def read(self, place: Place, roles: Mapping[str, str], section: str, *, lines: bool = False) -> Read:
        """Read columns of a table.

        Args:
            place: the table.
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


def value(engine: Engine, scalar: ir.Scalar) -> Any:
    """Compute one value."""
    return engine.rows(scalar.name("value").as_table())[0]["value"]


def describe(place: Place) -> str:
    """What an error message calls a table."""
    return place.name if isinstance(place, Files) else f"table {place.name}"


def check_columns(columns: Iterable[str], roles: Mapping[str, str], place: Place, section: str) -> None:
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
            f"{describe(place)} has no column {name!r} ({field}){hint}", f"its columns: {', '.join(columns)}"
        )


@dataclass(frozen=True)
class Dialect:
    """How a delimited text format is written."""

    delimiter: str
    quote: str
    """Empty where a quotation mark is a plain character."""


DELIMITED = {"csv": Dialect(",", '"'), "tsv": Dialect("\t", '"'), "recbole": Dialect("\t", "")}


def check_parquet(files: Files, names: Iterable[str]) -> None:
    """Refuse a file that lacks a column which others have: its rows would have nothing there, and fall out.

    Raises:
        UserError: naming the file and the column; or a file is not Parquet.
    """

    def lacking(path: str) -> tuple[str, list[str]]:
        try:
            with fsspec.open(path) as file:
                own = pq.read_schema(file).names
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read: {error}", "convert the file again") from None
        return path, sorted(set(names) - set(own))

    with ThreadPoolExecutor(FOOTERS) as pool:
        for path, missing in pool.map(lacking, files.paths if len(files.paths) > 1 else ()):
            if missing:
                problem = f"{path} has no column {missing[0]!r}, but other files of {files.path} have"
                raise UserError(problem, "the files of one table need the same columns")


def refuse_nested(table: ir.Table, roles: Mapping[str, str], place: Place, section: str) -> None:
    """Refuse lists and structures: engines write them differently."""
    for role, name in roles.items():
        kind = table[role].type()
        if kind.is_nested() or kind.is_time():
            field = f"{section}.{role.partition('_')[0]}"
            raise UserError(f"{describe(place)}: column {name!r} ({field}) holds {kind}", "write it as text or numbers")


def header(files: Files) -> list[str]:
    """The columns of delimited files; RecBole's without their types.

    Nothing is sniffed: every file is taken the same way.

    Raises:
        UserError: a header is missing, or differs between files.
    """
    first = _header(files, files.paths[0])
    for path in files.paths[1:]:
        other = _header(files, path)
        if other != first:
            raise UserError(
                f"{path} has the columns {', '.join(other)}, but {files.paths[0]} has {', '.join(first)}",
                "the files of one table need one header",
            )
    names = [name.rpartition(":")[0] or name for name in first] if files.format == "recbole" else first
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{files.paths[0]} has two columns {twice[0]!r}", "give each column a name of its own")
    return names


def _header(files: Files, path: str) -> list[str]:
    dialect = DELIMITED[files.format]
    style: dict[str, Any] = {"quotechar": dialect.quote} if dialect.quote else {"quoting": csv.QUOTE_NONE}
    text = {"mode": "rt", "encoding": "utf-8-sig", "errors": "replace", "newline": "", "compression": "infer"}
    try:
        with fsspec.open(path, **text) as file:
            names = next(csv.reader(file, delimiter=dialect.delimiter, **style), [])
    except (OSError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}", "make the file again") from None
    if any("\ufffd" in name for name in names):
        raise UserError(f"{path}, row 1: the header is not UTF-8 text", "save the file as UTF-8")
    if not any(name.strip() for name in names):
        raise UserError(f"{path} has no header in its first row", "put the names of the columns there")
    return [name.strip() for name in names]
