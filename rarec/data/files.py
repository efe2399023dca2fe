"""The files behind a path of the configuration: which they are, what format they hold, and their hash."""

from dataclasses import dataclass
from pathlib import Path

from rarec.artefacts import sha256_file, sha256_json
from rarec.errors import UserError
from rarec.paths import resolve

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".inter": "recbole",
    ".item": "recbole",
}
"""File name suffix to format; every one but Parquet may have `.gz` after it."""


@dataclass(frozen=True)
class Files:
    """One table spread over files of one format, in the order in which their rows count."""

    path: str
    """As the configuration has it, for messages."""
    paths: tuple[Path, ...]
    format: str

    @property
    def name(self) -> str:
        """What an error message calls it: the file itself where there is only one."""
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.path} ({len(self.paths)} files)"


def find_files(path: str, field: str) -> Files:
    """Find the files of a table.

    Args:
        path: a file, a directory (everything in it, however deep, with a known suffix; names that start with
            `.` or `_` are passed over), a glob, or `package:NAME/FILE`.
        field: the configuration's field that holds the path, for messages.

    Raises:
        UserError: nothing is there, a file is empty, or the format is unknown or not one and the same.
    """
    place = resolve(path)
    found = _list(place)
    if not found:
        raise UserError(f"{field}: {path} does not exist, or holds no table", f"known suffixes: {', '.join(FORMATS)}")
    formats = {file: _format(file) for file in found}
    for file, kind in formats.items():
        if kind is None:
            raise UserError(f"{field}: {file} has no known suffix", f"known suffixes: {', '.join(FORMATS)}")
        if file.stat().st_size == 0:
            raise UserError(f"{field}: {file} is empty", "give a table with at least one row")
    if len(set(formats.values())) > 1:
        kinds = ", ".join(sorted({str(kind) for kind in formats.values()}))
        raise UserError(f"{field}: {path} holds files of several formats ({kinds})", "name one of them by a glob")
    return Files(path, tuple(found), str(formats[found[0]]))


def digest(files: Files) -> str:
    """The sha256 of a table's bytes: of the file, or of the list of the files' own hashes."""
    hashes = [sha256_file(path) for path in files.paths]
    return hashes[0] if len(hashes) == 1 else sha256_json(hashes)


def _list(place: str) -> list[Path]:
    """The file; or what a directory or a glob holds, by name."""
    path = Path(place)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = (file for file in path.rglob("*") if _format(file) and file.is_file())
        return sorted(file for file in inside if not _hidden(file.relative_to(path)))
    pattern = str(path.relative_to(path.anchor))
    return sorted(match for match in Path(path.anchor).glob(pattern) if match.is_file())


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None
