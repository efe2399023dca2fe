"""Find the files of an input table, detect their format, and hash them.

Paths are local, or URLs of any file system that fsspec supports (`s3://`, `gs://`, `hdfs://`, `https://`, ...).
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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
NAMED = "table"
"""The format of a table that a database knows by its name."""
DELIMITED = {"csv": (",", '"'), "tsv": ("\t", '"'), "recbole": ("\t", "")}
"""Delimiter and quote character; the latter empty if a quotation mark is an ordinary character."""


@dataclass(frozen=True)
class TableLocation:
    """An input table: files of one format, in the order of their names, or a table of a database.

    Attributes:
        section: section of the configuration that names the table, for messages.
        path: path in the configuration; of a table of a database its name, as `NAME` or `SCHEMA.NAME`.
        paths: local paths, or URLs.
        format: one of the values of `FORMATS`, or `NAMED`.
        system: fsspec file system of URLs; None for local files.
    """

    section: str
    path: str
    paths: tuple[str, ...] = ()
    format: str = NAMED
    system: fsspec.AbstractFileSystem | None = None

    @property
    def name(self) -> str:
        """The name in messages: the file itself if there is only one."""
        if self.format == NAMED:
            return f"table {self.path}"
        return self.paths[0] if len(self.paths) == 1 else f"{self.path} ({len(self.paths)} files)"

    @property
    def short_section(self) -> str:
        """The last part of the section's name."""
        return self.section.rpartition(".")[2]

    def field(self, role: str) -> str:
        """Return the configuration field that names the column of a role."""
        return f"{self.section}.{role.partition('_')[0]}"


def find_files(path: str, section: str) -> TableLocation:
    """Find the files of a table.

    Args:
        path: a file, a directory (searched recursively for known suffixes, without names that start with
            `.` or `_`), a glob, a URL of any of these, or `package:NAME/FILE`.
        section: section of the configuration that has the path, for messages.

    Raises:
        UserError: there is no such file, a file is empty, or the format is unknown or mixed.
    """
    location = resolve_path(path).removeprefix("file://")
    field = f"{section}.path"
    system = open_file_system(location, field) if "://" in location else None
    try:
        paths = _list(location) if system is None else _list_remote(location, system)
        formats = sorted({_checked_format(file, system, field) for file in paths})
    except PermissionError as error:
        problem = f"{field}: {error.filename or location} may not be read by this user"
        raise UserError(problem, "change its permissions: chmod -R a+rX") from None
    if not paths:
        raise UserError(
            f"{field}: {path} does not exist or contains no table",
            f"paths are relative to the current directory; known suffixes: {', '.join(FORMATS)}",
        )
    if len(formats) > 1:
        problem = f"{field}: {path} contains several formats ({', '.join(formats)})"
        raise UserError(problem, "select one of them with a glob")
    return TableLocation(section, path, tuple(paths), formats[0], system)


def hash_files(files: TableLocation) -> str:
    """Return the hash of a table: of the bytes of a local file, or of the list of the files' hashes.

    Files behind a URL are not read: their names, sizes and version marks (ETag or time) are hashed instead.
    """
    if files.system is not None:
        return sha256_json([[path, *_version(files.system, path)] for path in files.paths])
    hashes = [sha256_file(Path(path)) for path in files.paths]
    return hashes[0] if len(hashes) == 1 else sha256_json(hashes)


def _checked_format(file: str, system: fsspec.AbstractFileSystem | None, field: str) -> str:
    """Return the format of a file that has one, may be read and is not empty."""
    kind = _format(file)
    if kind is None:
        raise UserError(f"{field}: {file} has no known suffix", f"known suffixes: {', '.join(FORMATS)}")
    if system is None and not os.access(file, os.R_OK):
        raise PermissionError(None, None, file)
    if not (system.size(file) if system else Path(file).stat().st_size):
        raise UserError(f"{field}: {file} is empty", "give a table with at least one row")
    return kind


def _version(system: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Return the size and the version mark of a remote file."""
    known = system.info(path)
    return [str(known["size"]), str(known.get("ETag") or system.ukey(path))]


def open_file_system(url: str, field: str) -> fsspec.AbstractFileSystem:
    """Return the fsspec file system of a URL.

    Raises:
        UserError: there is none, or its driver is not installed; the message names the field.
    """
    try:
        return url_to_fs(url)[0]
    except (ImportError, ValueError, OSError) as error:
        remedy = "install the package named above with pip, or use a local path or a URL scheme that fsspec supports"
        raise UserError(f"{field}: {url} cannot be opened by fsspec: {error}", remedy) from None


def _list(location: str) -> list[str]:
    """List a file, the tables in a directory, or the matches of a glob, sorted by name."""
    path = Path(location)
    if path.is_dir():
        return _tables(str(path), _walk(str(path)))
    if path.is_file():
        return [location]
    matches = glob.glob(location, recursive=True, include_hidden=True)  # noqa: PTH207 # pathlib skips linked folders
    return sorted(match for match in matches if Path(match).is_file())


def _walk(root: str) -> Iterator[str]:
    """Yield the files of a directory; each folder once, also where links lead to it.

    Raises:
        PermissionError: a folder may not be read.
    """
    visited = set[str]()
    for folder, names, files in os.walk(root, followlinks=True, onerror=_reraise):
        real = os.path.realpath(folder)
        if real in visited:
            names.clear()
            continue
        visited.add(real)
        names.sort()
        yield from (str(path) for path in (Path(folder, name) for name in files) if path.is_file())


def _reraise(error: OSError) -> None:
    raise error


def _list_remote(url: str, system: fsspec.AbstractFileSystem) -> list[str]:
    if system.isdir(url):
        return _tables(system.unstrip_protocol(url), map(system.unstrip_protocol, system.find(url)))
    names = system.glob(url) if any(mark in url for mark in "*?[") else [url] if system.isfile(url) else []
    return sorted(map(system.unstrip_protocol, names))


def _tables(root: str, paths: Iterable[str]) -> list[str]:
    """Return the table files of a directory, without those in hidden places."""
    hidden = re.compile(r"(^|/)[._]")
    return sorted(path for path in paths if _format(path) and not hidden.search(path.removeprefix(root)))


def _format(path: str) -> str | None:
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None
