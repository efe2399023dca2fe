"""Scan a table of each format with Spark."""

import collections
import re
from collections.abc import Mapping
from pathlib import Path

import fsspec
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from rarec.data.engines.prepare_engine import KEYS, MIXED, TableLocation, display_name
from rarec.data.engines.table_files import DELIMITED, TableFiles, read_header
from rarec.errors import UserError

_NOT_PLAIN = {
    "BOOLEAN": "truth values",
    "OBJECT": "objects",
    "ARRAY": "lists",
    "DECIMAL(": "integers of more than 20 digits",
}
"""Types of JSON values, as Spark calls them, that are neither text nor numbers that every engine reads."""
_TYPE = r"^[A-Z]+(\((?=(2[1-9]|3[0-9]),0\)))?"
"""The name of a type, without what is in it."""
SCHEMES = {"s3": "s3a", "gcs": "gs", "az": "abfs"}
"""URL schemes that Hadoop spells differently from fsspec."""


VERIFIED = {"parquet.page.verify-checksum.enabled": "true"}
"""Option of Parquet's reader; Spark leaves it off."""


def scan(session: SparkSession, location: TableLocation) -> tuple[DataFrame, dict[str, str]]:
    """Return a table as a data frame, and the frame's column for each column name of the table."""
    if not isinstance(location, TableFiles):
        frame = session.table(location.name)
        return frame, {name: name for name in frame.columns}
    paths = [_pattern(path) for path in location.paths]
    if location.format in DELIMITED:
        return _delimited(session, location, paths)
    frame = (
        _jsonl(session, location, paths)
        if location.format == "jsonl"
        else session.read.options(**VERIFIED).parquet(*paths)
    )
    return frame, {name: name for name in frame.columns}


def _jsonl(session: SparkSession, files: TableFiles, paths: list[str]) -> DataFrame:
    """Read JSON lines, with lists as JSON text.

    Spark would silently keep only the first of two objects on a line, so such lines are refused.
    """
    lines = session.read.text(paths)
    double = lines.filter(F.col("value").rlike(r"\}\s*\{\s*\"")).limit(1).collect()
    if double:
        problem = f"{display_name(files)} has a line with two objects: {double[0]['value'][:80]}"
        raise UserError(problem, "write one {...} per line")
    frame = session.read.json(paths, mode="FAILFAST")
    lists = {name for name, kind in frame.dtypes if kind.startswith("array")}
    return frame.select(
        *[F.to_json(identifier(n)).alias(n) if n in lists else F.col(identifier(n)) for n in frame.columns]
    )


def json_unfit(session: SparkSession, files: TableFiles, roles: Mapping[str, str]) -> dict[str, str]:
    """Return what the columns of JSON lines hold that are no ids and no times.

    Spark reads a column of several types as text, so each value's own type is asked for.
    """
    names = [name for role, name in roles.items() if role in KEYS] if files.format == "jsonl" else []
    lines = session.read.text([_pattern(path) for path in files.paths])
    parsed = lines.select(F.try_parse_json("value").alias("json"))
    # a path has no escapes: of a name with both quotes the types are not asked for
    names = [name for name in names if not {"'", '"'} <= set(name)]
    paths = {name: f'$["{name}"]' if "'" in name else f"$['{name}']" for name in names}
    kinds = [
        F.collect_set(F.regexp_extract(F.expr(f"schema_of_variant(try_variant_get(json, {quoted(path)}))"), _TYPE, 0))
        for path in paths.values()
    ]
    found = parsed.agg(*kinds).collect()[0] if kinds else ()
    return {name: what for name, own in zip(names, found, strict=True) if (what := _unfit(set(own) - {"VOID", ""}))}


def _unfit(kinds: set[str]) -> str | None:
    plain = {"text" if kind == "STRING" else "a number" for kind in kinds if kind not in _NOT_PLAIN}
    if len(kinds) > 1 and (len(plain) > 1 or kinds & _NOT_PLAIN.keys()):
        return MIXED
    return next((_NOT_PLAIN[kind] for kind in kinds & _NOT_PLAIN.keys()), None)


def _delimited(session: SparkSession, files: TableFiles, paths: list[str]) -> tuple[DataFrame, dict[str, str]]:
    """Read all columns as text, by position.

    A quoted text may contain newlines, so one task reads a whole file: for speed, provide many files, or Parquet.
    """
    names, dialect = read_header(files), DELIMITED[files.format]
    schema = ", ".join(f"c{index} STRING" for index in range(len(names)))
    reader = session.read.options(sep=dialect.delimiter, quote=dialect.quote)
    if dialect.quote:
        reader = reader.options(escape=dialect.quote, multiLine=True)
    frame = reader.csv(paths, schema=schema, header=True, mode="FAILFAST", encoding="UTF-8")
    return frame, {name: f"c{index}" for index, name in enumerate(names)}


def raise_if_not_utf8(files: TableFiles) -> None:
    """Decode text files strictly, which Spark does not.

    Raises:
        UserError: a file is not UTF-8; the message says where.
    """
    for path in files.paths:
        with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
            try:
                collections.deque(file, maxlen=0)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text: {error}", "save the file as UTF-8") from None


def hadoop_path(path: str) -> str:
    """Return a path or URL in Hadoop's spelling."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return f"file://{Path(path).absolute()}"
    if scheme == "memory":
        raise UserError(
            f"{path} is in the memory of this process, where Spark cannot read it",
            "store the file elsewhere, or use duckdb",
        )
    return f"{SCHEMES.get(scheme, scheme)}://{rest}"


def _pattern(path: str) -> str:
    """Return the Hadoop pattern that matches one file exactly.

    Hadoop reads names as patterns, and skips hidden files silently.
    """
    if path.rpartition("/")[2].startswith(("_", ".")):
        raise UserError(f"{path} is skipped by Spark because of its first character", "rename it, or use duckdb")
    return re.sub(r"([][{}*?\\])", r"\\\1", hadoop_path(path))


def quoted(text: str) -> str:
    """Return a SQL string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def identifier(name: str) -> str:
    """Return a quoted SQL identifier."""
    return "`" + name.replace("`", "``") + "`"
