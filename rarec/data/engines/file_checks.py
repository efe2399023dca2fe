"""Check that the files of an input table are whole and agree with each other, where an engine would not notice."""

import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.data.engines.table_files import FOOTERS, TableFiles
from rarec.errors import UserError

BLOCK = 1 << 20
"""Bytes read and decompressed at a time."""
_GZIP = zlib.MAX_WBITS | 16
"""Code for the format gzip, of which zlib then compares checksum and length."""
_KINDS: dict[str, Callable[[pa.DataType], bool]] = {
    "integers": pa.types.is_integer,
    "floats": pa.types.is_floating,
    "decimals": pa.types.is_decimal,
    "text": lambda kind: any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    ),
    "dates": pa.types.is_date,
    "timestamps": lambda kind: pa.types.is_timestamp(kind) and kind.tz is None,
    "timestamps with a time zone": lambda kind: pa.types.is_timestamp(kind) and kind.tz is not None,
}
"""Kinds of Parquet columns, between which no engine converts without loss."""


def raise_if_damaged(files: TableFiles, names: Iterable[str]) -> None:
    """Read `.gz` files, and the named columns of Parquet files, to their end.

    DuckDB checks neither the checksum and length of gzip nor the page checksums of Parquet. Spark checks both.

    Raises:
        UserError: a file is cut short, damaged, or followed by something else.
    """
    names = list(dict.fromkeys(names))

    def damage(path: str) -> str | None:
        try:
            if files.format == "parquet":
                _read_parquet(path, names)
            elif path.lower().endswith(".gz"):
                _read_gzip(path)
        except (OSError, pa.ArrowInvalid, zlib.error) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(FOOTERS) as pool:
        for path, found in zip(files.paths, pool.map(damage, files.paths), strict=True):
            if found:
                raise UserError(
                    f"{path} cannot be read to its end: {found[:200]}", "write the file again, or copy it again"
                )


def check_parquet_columns(files: TableFiles, names: Iterable[str]) -> None:
    """Check that every Parquet file of a table has the given columns, once each and of one type.

    Rows of a file without a column would have nulls there and would be dropped silently; of two columns of a name, or
    of two types, an engine would choose one.

    Raises:
        UserError: a file lacks a column that others have, has it twice or with another type, or is not Parquet.
    """
    names = list(dict.fromkeys(names))

    def schema(path: str) -> pa.Schema:
        try:
            with fsspec.open(path) as file:
                return pq.read_schema(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read: {error}", "write the file again") from None

    first = dict[str, tuple[str, str]]()
    with ThreadPoolExecutor(FOOTERS) as pool:
        for path, found in zip(files.paths, pool.map(schema, files.paths), strict=True):
            for name in names:
                _check_column(files, path, name, found.names.count(name))
                kind = _kind(found.field(name).type)
                where, expected = first.setdefault(name, (path, kind)) if kind != "null" else ("", kind)
                if kind != expected:
                    problem = f"{path}: column {name!r} holds {kind}, but in {where} {expected}"
                    raise UserError(problem, "write the column with one type in all files")


def _check_column(files: TableFiles, path: str, name: str, count: int) -> None:
    if not count:
        problem = f"{path} has no column {name!r}, which other files of {files.path} have"
        raise UserError(problem, "give all files of a table the same columns")
    if count > 1:
        raise UserError(f"{path} has {count} columns named {name!r}", "give each column its own name")


def _kind(column: pa.DataType) -> str:
    column = column.value_type if pa.types.is_dictionary(column) else column
    return next((kind for kind, test in _KINDS.items() if test(column)), str(column))


def _read_parquet(path: str, names: list[str]) -> None:
    """Read columns to their end; Arrow compares the checksums of pages that have one."""
    with fsspec.open(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        try:
            for _ in parquet.iter_batches(columns=names):
                pass
        except pa.ArrowNotImplementedError:  # a compression or a type that only the engine knows
            pass


def _read_gzip(path: str) -> None:
    """Decompress a file to its end; zlib compares the checksum and length of each member."""
    with fsspec.open(path) as file:
        member = None
        while block := file.read(BLOCK):
            while block:
                member = member or zlib.decompressobj(wbits=_GZIP)
                member.decompress(block, BLOCK)
                block = member.unconsumed_tail or member.unused_data
                member = None if member.eof else member
    if member:
        raise zlib.error("the compressed text ends too early")
