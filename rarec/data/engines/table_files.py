"""Find the files of an input table, detect their format, read their headers, and hash them.

Paths are local, or URLs of any file system that fsspec supports (`s3://`, `gs://`, `hdfs://`, `https://`, ...).
"""

import csv
import glob
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from rarec.config.shipped import resolve_path
from rarec.errors import UserError
from rarec.storage.artefacts import sha256_json
from rarec.storage.files import sha256_file

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".inter": "recbole",
    ".item": "recbole",
}
"""File name suffix to format; all but Parquet may be followed by `.gz`."""
DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
}
"""Package to install for a URL scheme that fsspec does not open by itself."""
FOOTERS = 16
"""Number of Parquet footers read in parallel."""


@dataclass(frozen=True)
class Dialect:
    """Delimiter and quote character of a delimited text format."""

    delimiter: str
    quote: str
    """Empty if a quotation mark is an ordinary character."""


DELIMITED = {"csv": Dialect(",", '"'), "tsv": Dialect("\t", '"'), "recbole": Dialect("\t", "")}


@dataclass(frozen=True)
class TableFiles:
    """The files of one table, all of one format, in the order of their names.

    Attributes:
        path: path in the configuration, for messages.
        paths: local paths, or URLs.
        format: one of the values of `FORMATS`.
        system: fsspec file system of URLs; None for local files.
    """

    path: str
    paths: tuple[str, ...]
    format: str
    system: fsspec.AbstractFileSystem | None = None

    @property
    def name(self) -> str:
        """The name in messages: the file itself if there is only one."""
        return self.paths[0] if len(self.paths) == 1 else f"{self.path} ({len(self.paths)} files)"


def find_files(path: str, field: str) -> TableFiles:
    """Find the files of a table.

    Args:
        path: a file, a directory (searched recursively for known suffixes, without names that start with
            `.` or `_`), a glob, a URL of any of these, or `package:NAME/FILE`.
        field: configuration field that holds the path, for messages.

    Raises:
        UserError: nothing is found, a file is empty, or the format is unknown or mixed.
    """
    location = resolve_path(path).removeprefix("file://")
    system = _file_system(location, field) if "://" in location else None
    try:
        found = _list(location, field) if system is None else _list_remote(location, system)
    except PermissionError as error:
        raise _unreadable(str(error.filename or location), field) from None
    if not found:
        raise UserError(
            f"{field}: {path} does not exist or contains no table",
            f"paths are relative to the current directory; known suffixes: {', '.join(FORMATS)}",
        )
    formats = {file: _format(file) for file in found}
    for file, kind in formats.items():
        if kind is None:
            raise UserError(
                f"{field}: {file} has no known suffix",
                f"known suffixes: {', '.join(FORMATS)}",
            )
        if system is None and not os.access(file, os.R_OK):
            raise _unreadable(file, field)
        if not (system.size(file) if system else Path(file).stat().st_size):
            raise UserError(f"{field}: {file} is empty", "give a table with at least one row")
    if len(set(formats.values())) > 1:
        kinds = ", ".join(sorted({str(kind) for kind in formats.values()}))
        raise UserError(f"{field}: {path} contains several formats ({kinds})", "select one of them with a glob")
    return TableFiles(path, tuple(found), str(formats[found[0]]), system)


def hash_files(files: TableFiles) -> str:
    """Return the hash of a table: of the bytes of a local file, or of the list of the files' hashes.

    Files behind a URL are not read: their names, sizes and version marks (ETag or time) are hashed instead.
    """
    if files.system is not None:
        return sha256_json([[path, *_version(files.system, path)] for path in files.paths])
    hashes = [sha256_file(Path(path)) for path in files.paths]
    return hashes[0] if len(hashes) == 1 else sha256_json(hashes)


def read_header(files: TableFiles) -> list[str]:
    """Read the column names of delimited files; type suffixes of RecBole headers are removed.

    The dialect depends on the format alone, so every file is parsed the same way.

    Raises:
        UserError: a header is missing, differs between files, or repeats a name.
    """
    first = _read_one_header(files, files.paths[0])
    for path in files.paths[1:]:
        other = _read_one_header(files, path)
        if other != first:
            raise UserError(
                f"{path} has the columns {', '.join(other)}, but {files.paths[0]} has {', '.join(first)}",
                "give all files of a table the same header",
            )
    names = [name.rpartition(":")[0] or name for name in first] if files.format == "recbole" else first
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{files.paths[0]} has two columns named {twice[0]!r}", "give each column its own name")
    return names


def _version(system: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Return the size and the version mark of a remote file."""
    known = system.info(path)
    return [str(known["size"]), str(known.get("ETag") or system.ukey(path))]


def _file_system(url: str, field: str) -> fsspec.AbstractFileSystem:
    try:
        return url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        driver = DRIVERS.get(url.partition("://")[0])
        remedy = f"pip install {driver}" if driver else "use a local path, or a URL scheme that fsspec supports"
        raise UserError(f"{field}: {url} cannot be opened: {error}", remedy) from None


def _unreadable(path: str, field: str) -> UserError:
    return UserError(f"{field}: {path} may not be read by this user", "change its permissions: chmod -R a+rX")


def _list(location: str, field: str) -> list[str]:
    """List a file, the tables in a directory, or the matches of a glob, sorted by name."""
    path = Path(location)
    if path.is_file():
        return [location]
    if path.is_dir():
        inside = [path, *_inside(path)]
        closed = next((each for each in inside if each.is_dir() and not os.access(each, os.R_OK | os.X_OK)), None)
        if closed is not None:  # its files would be passed over without a word
            raise _unreadable(str(closed), field)
        return _tables(str(path), (str(file) for file in inside if file.is_file()))
    found = glob.glob(location, recursive=True, include_hidden=True)  # noqa: PTH207 # pathlib passes linked folders over
    return sorted(match for match in found if Path(match).is_file())


def _inside(root: Path) -> Iterator[Path]:
    """Yield what is in a directory, also in linked folders, but not in a link back to a folder that holds it."""
    for folder, names, files in os.walk(root, followlinks=True):
        place = Path(folder)
        above = {os.path.realpath(place), *map(os.path.realpath, place.parents)}
        names[:] = [name for name in names if os.path.realpath(place / name) not in above]
        yield from (place / name for name in (*names, *files))


def _list_remote(url: str, system: fsspec.AbstractFileSystem) -> list[str]:
    if system.isdir(url):
        root = system.unstrip_protocol(url)
        return _tables(root, (system.unstrip_protocol(name) for name in system.find(url)))
    found = system.glob(url) if any(mark in url for mark in "*?[") else [url] if system.isfile(url) else []
    return sorted(system.unstrip_protocol(name) for name in found)


def _tables(root: str, inside: Iterable[str]) -> list[str]:
    """Return the table files of a directory, without hidden files."""
    return sorted(file for file in inside if _format(file) and not _hidden(file.removeprefix(root)))


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _format(path: str) -> str | None:
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _read_one_header(files: TableFiles, path: str) -> list[str]:
    dialect = DELIMITED[files.format]
    style: dict[str, Any] = {"quotechar": dialect.quote} if dialect.quote else {"quoting": csv.QUOTE_NONE}
    text = {"mode": "rt", "encoding": "utf-8-sig", "errors": "replace", "newline": "", "compression": "infer"}
    try:
        with fsspec.open(path, **text) as file:
            names = next(csv.reader(file, delimiter=dialect.delimiter, **style), [])
    except (OSError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}", "write the file again") from None
    if any("\ufffd" in name for name in names):
        raise UserError(f"{path}, row 1: the header is not UTF-8 text", "save the file as UTF-8")
    if not any(name.strip() for name in names):
        raise UserError(f"{path} has no header in its first row", "write the column names there")
    return [name.strip() for name in names]
