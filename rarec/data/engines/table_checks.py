"""Check input tables before an engine reads them: headers, line ends, damage, and the columns and their types."""

import csv
import re
import shlex
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import fsspec
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.data.engines.table_files import DELIMITED, NAMED, TableLocation
from rarec.errors import UserError, nearest

Result = TypeVar("Result")
BLOCK = 1 << 20
"""Bytes decompressed at a time."""
THREADS = 16
"""Number of files that are checked in parallel."""
KINDS = {
    r"u?int\d": "integers",
    r"float|halffloat|double": "floats",
    r"decimal": "decimals",
    r"(large_)?(string|binary)": "text",
    r"date": "dates",
    r"timestamp.*tz=": "timestamps with a time zone",
    r"timestamp": "timestamps",
}
"""Kinds of Parquet columns, by how Arrow writes their types; engines convert without loss within a kind only."""
KEYS = ("user", "item", "time", "position")
"""Roles whose values are compared, and so must be of one type."""
ALIKE = "write it as text in every row, or as numbers in every row; in a database, a view with a CAST will do"
DATED = "name a column of timestamps, dates, ISO 8601 text or epoch numbers; in a database, a view can have one"
"""Remedies of a column whose type does not serve."""


def read_header(files: TableLocation) -> list[str]:
    """Read the column names of delimited files; type suffixes of RecBole headers are removed.

    The dialect depends on the format alone, so every file is parsed the same way.

    Raises:
        UserError: a header is missing, differs between files, or repeats a name.
    """
    headers = {path: _read_one_header(files, path) for path in files.paths}
    first = headers[files.paths[0]]
    for path, header in headers.items():
        if header != first:
            problem = f"{path} has the columns {', '.join(header)}, but {files.paths[0]} has {', '.join(first)}"
            raise UserError(problem, "give all files of a table the same header")
    names = [name.rpartition(":")[0] or name for name in first] if files.format == "recbole" else first
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"{files.paths[0]} has two columns named {repeated[0]!r}", "give each column its own name")
    return names


def check_line_ends(files: TableLocation) -> None:
    r"""Check that all lines of a file end alike: in `\n`, `\r\n` or `\r`.

    Raises:
        UserError: one does not; the message names it.
    """
    for path in files.paths:
        with fsspec.open(path, "rt", encoding="latin-1", newline="", compression="infer") as file:
            first = ""
            for number, line in enumerate(file, start=1):
                end = line[len(line.rstrip("\r\n")) :]
                first = first or end
                if end not in (first, ""):
                    problem = f"{path}: line {number} ends with {end!r}, but those before it with {first!r}"
                    remedy = f"end all lines alike: perl -pi -e 's/\\r\\n?/\\n/g' {shlex.quote(path)}"
                    unpack = "unpack the file, then " if path.lower().endswith(".gz") else ""
                    raise UserError(problem, f"{unpack}{remedy}")


def check_gzip(files: TableLocation) -> None:
    """Decompress `.gz` files to their end; DuckDB compares neither the checksum nor the length.

    Raises:
        UserError: a file is cut short, damaged, or followed by something else.
    """
    _for_each(_decompress, [path for path in files.paths if path.lower().endswith(".gz")])


def check_parquet(files: TableLocation, names: Iterable[str], *, pages: bool) -> list[int]:
    """Check that every Parquet file of a table has the given columns, once each and of one type.

    Rows of a file without a column would have nulls there and would be dropped silently; of two columns of a name, or
    of two types, an engine would choose one.

    Args:
        files: the files.
        names: column names.
        pages: read the columns to compare the checksums of their pages, which DuckDB does not.

    Returns:
        The number of each file's first row in the whole table, from 1.

    Raises:
        UserError: a file lacks a column that others have, has it twice or with another type, or is damaged.
    """
    names = list(dict.fromkeys(names))
    first = dict[str, tuple[str, str]]()
    read = _for_each(partial(_read_parquet, names=names if pages else []), files.paths)
    for path, (schema, _) in zip(files.paths, read, strict=True):
        for name in names:
            if schema.names.count(name) != 1:
                problem = f"{path} has {schema.names.count(name)} columns named {name!r}"
                raise UserError(problem, "give every file of the table that column once")
            kind = _kind(schema.field(name).type)
            file, expected = first.setdefault(name, (path, kind)) if kind != "null" else ("", kind)
            if kind != expected:
                problem = f"{path}: column {name!r} holds {kind}, but in {file} {expected}"
                raise UserError(problem, "write the column with one type in all files")
    return list(accumulate((rows for _, rows in read), initial=1))[:-1]


class MissingColumn(UserError):
    """A table lacks the column of a role.

    Args:
        role: the role.
        name: the column that it should have.
        columns: the columns that it has.
        location: the table.
    """

    def __init__(self, role: str, name: str, columns: Sequence[str], location: TableLocation) -> None:
        self.role, self.columns = role, columns
        hint = nearest(name, columns, listed=False)
        problem = f"{location.name} has no column {name!r} ({location.field(role)}){hint}"
        super().__init__(problem, f"its columns: {', '.join(columns)}")


def check_columns(columns: Iterable[str], roles: Mapping[str, str], location: TableLocation) -> None:
    """Check that the column of every role exists.

    Raises:
        MissingColumn: a column is missing; the message suggests the nearest name and lists the columns.
    """
    columns = list(columns)
    for role, name in roles.items():
        if name not in columns:
            raise MissingColumn(role, name, columns, location)


def check_types(
    table: ir.Table, roles: Mapping[str, str], location: TableLocation, mixed: Collection[str] = ()
) -> None:
    """Refuse types that are not what a role needs, or that engines write differently.

    Lists, structures, durations and times of day are refused everywhere; ids are text or numbers, and an order is not a
    truth. Types that Ibis does not know are refused too, but in a database, from which they are copied as text.

    Args:
        table: one column for each role.
        roles: column name in the table, by role.
        location: the table, for messages.
        mixed: columns of text that hold objects, lists or values of several types: no ids and no times.

    Raises:
        UserError: a column has such a type.
    """
    for role, name in roles.items():
        kind = table[role].type()
        wrong = kind.is_nested() or kind.is_time() or kind.is_interval()
        wrong = wrong or (kind.is_unknown() and location.format != NAMED)
        wrong = wrong or (role in KEYS and (kind.is_boolean() or name in mixed))
        if wrong or (role in ("user", "item") and kind.is_temporal()):
            shown = kind.raw_type if kind.is_unknown() else kind
            holds = "objects, lists or values of several types" if name in mixed else f"values of type {shown}"
            problem = f"{location.name}: column {name!r} ({location.field(role)}) holds {holds}"
            raise UserError(problem, DATED if role == "time" and name not in mixed else ALIKE)


def _read_one_header(files: TableLocation, path: str) -> list[str]:
    delimiter, quote = DELIMITED[files.format]
    style: dict[str, Any] = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
    text = {"mode": "rt", "encoding": "utf-8-sig", "errors": "replace", "newline": "", "compression": "infer"}
    try:
        with fsspec.open(path, **text) as file:
            names = next(csv.reader(file, delimiter=delimiter, **style), [])
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}", "write the file again") from None
    if any("\ufffd" in name for name in names):
        raise UserError(f"{path}, row 1: the header is not UTF-8 text", "save the file as UTF-8")
    if not any(name.strip() for name in names):
        raise UserError(f"{path} has no header in its first row", "write the column names there")
    return [name.strip() for name in names]


def _kind(column: pa.DataType) -> str:
    name = str(column.value_type if pa.types.is_dictionary(column) else column)
    return next((kind for pattern, kind in KINDS.items() if re.match(pattern, name)), name)


def _for_each(read: Callable[[str], Result], paths: Sequence[str]) -> list[Result]:
    """Read files in parallel; return the results in the order of the paths.

    Raises:
        UserError: a file is damaged.
    """

    def checked(path: str) -> Result:
        try:
            return read(path)
        except (OSError, EOFError, pa.ArrowInvalid, zlib.error) as error:
            problem = f"{path} cannot be read to its end: {str(error)[:200]}"
            raise UserError(problem, "write the file again, or copy it again") from None

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(checked, paths))


def _decompress(path: str) -> None:
    with fsspec.open(path, compression="gzip") as file:
        while file.read(BLOCK):
            pass


def _read_parquet(path: str, names: list[str]) -> tuple[pa.Schema, int]:
    """Return the schema and the number of rows of a Parquet file.

    Columns are read to their end, so that Arrow compares the pages' checksums.
    """
    with fsspec.open(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        try:
            for _ in parquet.iter_batches(columns=names) if names else ():
                pass
        except pa.ArrowNotImplementedError:  # a compression or a type that only the engine knows
            pass
        return parquet.schema_arrow, parquet.metadata.num_rows
