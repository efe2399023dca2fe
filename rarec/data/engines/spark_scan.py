"""How Spark scans a table of each format."""

import collections
import re
from pathlib import Path

import fsspec
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from rarec.data.engines.base import TableLocation, display_name
from rarec.data.engines.table_files import DELIMITED, TableFiles, read_header
from rarec.errors import UserError

SCHEMES = {"s3": "s3a", "gcs": "gs", "az": "abfs"}
"""fsspec's name of a file system to Hadoop's, where they differ."""


def scan(session: SparkSession, location: TableLocation) -> tuple[DataFrame, dict[str, str]]:
    """A table, and its columns: name in the table to name in the frame."""
    if not isinstance(location, TableFiles):
        frame = session.table(location.name)
        return frame, {name: name for name in frame.columns}
    paths = [_pattern(path) for path in location.paths]
    if location.format in DELIMITED:
        return _delimited(session, location, paths)
    frame = _jsonl(session, location, paths) if location.format == "jsonl" else session.read.parquet(*paths)
    return frame, {name: name for name in frame.columns}


def _jsonl(session: SparkSession, files: TableFiles, paths: list[str]) -> DataFrame:
    """Lists become their JSON text. Of two objects on a line Spark would read the first and lose the other."""
    lines = session.read.text(paths)
    double = lines.filter(F.col("value").rlike(r"\}\s*\{\s*\"")).limit(1).collect()
    if double:
        problem = f"{display_name(files)} holds a line that looks like two objects: {double[0]['value'][:80]}"
        raise UserError(problem, "write one {...} a line")
    frame = session.read.json(paths, mode="FAILFAST")
    lists = {name for name, kind in frame.dtypes if kind.startswith("array")}
    return frame.select(*[F.to_json(quoted(n)).alias(n) if n in lists else F.col(quoted(n)) for n in frame.columns])


def _delimited(session: SparkSession, files: TableFiles, paths: list[str]) -> tuple[DataFrame, dict[str, str]]:
    """Texts by position. A quoted text may hold newlines, so a file is read by one task: give many, or Parquet."""
    names, dialect = read_header(files), DELIMITED[files.format]
    schema = ", ".join(f"c{index} STRING" for index in range(len(names)))
    reader = session.read.options(sep=dialect.delimiter, quote=dialect.quote)
    if dialect.quote:
        reader = reader.options(escape=dialect.quote, multiLine=True)
    frame = reader.csv(paths, schema=schema, header=True, mode="FAILFAST", encoding="UTF-8")
    return frame, {name: f"c{index}" for index, name in enumerate(names)}


def raise_if_not_utf8(files: TableFiles) -> None:
    """Read text files as Spark does not, strictly.

    Raises:
        UserError: one is no UTF-8; it says where.
    """
    for path in files.paths:
        with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
            try:
                collections.deque(file, maxlen=0)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not utf-8 text: {error}", "save the file as UTF-8") from None


def hadoop(path: str) -> str:
    """A path or URL as Hadoop spells it."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return f"file://{Path(path).absolute()}"
    if scheme == "memory":
        raise UserError(f"{path} lies in this process, where Spark cannot read it", "use another place, or duckdb")
    return f"{SCHEMES.get(scheme, scheme)}://{rest}"


def _pattern(path: str) -> str:
    """The pattern of one file; Hadoop takes names for patterns, and passes over hidden files in silence."""
    if path.rpartition("/")[2].startswith(("_", ".")):
        raise UserError(f"{path} is hidden from Spark by its first character", "give it another name, or use duckdb")
    return re.sub(r"([][{}*?\\])", r"\\\1", hadoop(path))


def quoted(name: str) -> str:
    """A SQL name."""
    return "`" + name.replace("`", "``") + "`"
