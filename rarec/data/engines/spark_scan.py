"""Scan a table of each format with Spark."""

import collections
import re
from pathlib import Path

import fsspec
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from rarec.data.engines.prepare_engine import TableLocation, display_name
from rarec.data.engines.table_files import DELIMITED, TableFiles, read_header
from rarec.errors import UserError

SCHEMES = {"s3": "s3a", "gcs": "gs", "az": "abfs"}
"""URL schemes that Hadoop spells differently from fsspec."""


def scan(session: SparkSession, location: TableLocation) -> tuple[DataFrame, dict[str, str]]:
    """Return a table as a data frame, and the frame's column for each column name of the table."""
    if not isinstance(location, TableFiles):
        frame = session.table(location.name)
        return frame, {name: name for name in frame.columns}
    paths = [_pattern(path) for path in location.paths]
    if location.format in DELIMITED:
        return _delimited(session, location, paths)
    frame = _jsonl(session, location, paths) if location.format == "jsonl" else session.read.parquet(*paths)
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


def identifier(name: str) -> str:
    """Return a quoted SQL identifier."""
    return "`" + name.replace("`", "``") + "`"
