"""Shards that lie elsewhere, behind an fsspec URL: what describes them is fetched whole, tars when they are due.

Fetched tars stay in a directory of bounded size that processes share. What is there is whole and was verified; what is
least recently opened goes first. A tar that goes while another process reads it stays readable there until closed.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

from rarec.artefacts import MANIFEST, read_manifest
from rarec.data.shards.batch_plan import SHUFFLED_TOGETHER
from rarec.data.shards.index import REPAIR, tar_name
from rarec.errors import UserError
from rarec.files import locked, new_directory, write_aside

OPEN = 2 * SHUFFLED_TOGETHER
"""Tars held open: a window of the plan lies in two groups of shards, unless they are tiny."""
_BLOCK = 2**22
_LOCKS = 64
"""Fetches of different tars that do not wait for each other."""
_ABANDONED = 3600
"""Seconds without a byte written, after which a fetch is taken for dead."""
_REACH = "check train.stream.remote, the network, and the credentials that fsspec finds; the same command goes on"
_AGAIN = "copy run.dir/shards there again, whole, or fetch its description anew: rarec shards CONFIG --fresh"


class Tars(Protocol):
    """Where the tars are."""

    def name(self, shard: int) -> str:
        """Of a tar, for messages."""

    def open(self, shard: int) -> BinaryIO:
        """A tar, opened for reading."""

    def drop_cached(self, shard: int) -> bool:
        """Get a tar that proved bad anew; False where there is no other copy."""


class LocalTars:
    """Tars in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def name(self, shard: int) -> str:
        """Its path."""
        return str(self.directory / tar_name(shard))

    def open(self, shard: int) -> BinaryIO:
        """A tar, opened for reading.

        Raises:
            UserError: it is missing or may not be read.
        """
        try:
            handle = os.open(self.name(shard), os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for ever
            return os.fdopen(handle, "rb")
        except FileNotFoundError:
            raise UserError(f"shard {self.name(shard)} is missing", REPAIR) from None
        except OSError as error:
            raise UserError(f"shard {self.name(shard)} cannot be read: {error.strerror}", REPAIR) from None

    def drop_cached(self, shard: int) -> bool:
        """There is no other copy."""
        return False


class RemoteTars:
    """Tars behind a URL, fetched into a cache as they are opened.

    Args:
        url: of the directory of shards.
        records: of the shards, from their manifest.
        cache: directory of the fetched tars, shared by processes.
        most: bytes that they may take.

    Raises:
        UserError: the cache is too small for the tars that are read at the same time.
    """

    def __init__(self, url: str, records: Sequence[Mapping[str, Any]], cache: Path, most: int) -> None:
        needed = sum(sorted(record["bytes"] for record in records)[-OPEN:])
        if needed > most:
            problem = f"train.stream.cache_gb = {most / 1e9:g} is too small: {OPEN} tars are read at the same time"
            raise UserError(problem, f"raise it to {needed / 1e9:.3g} or more, or lower shards.samples_per_shard")
        self._url, self._records, self._cache, self._most = _place(url), records, cache, most
        self._locks = cache / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)

    def name(self, shard: int) -> str:
        """Its URL."""
        return f"{self._url}/{tar_name(shard)}"

    def open(self, shard: int) -> BinaryIO:
        """A tar, opened for reading; fetched if it is not in the cache.

        Raises:
            UserError: it cannot be fetched, or is not what the manifest says.
        """
        path = self._cache / tar_name(shard)
        while True:
            try:
                os.utime(path)  # the time of the last opening
                return path.open("rb")
            except FileNotFoundError:  # not yet there, or gone again to make room
                self._fetch(shard, path)

    def drop_cached(self, shard: int) -> bool:
        """Drop a cached tar that proved bad; the next opening fetches it again."""
        (self._cache / tar_name(shard)).unlink(missing_ok=True)
        return True

    def _fetch(self, shard: int, path: Path) -> None:
        with locked(self._locks / str(shard % _LOCKS)):
            if not path.exists():  # another process may just have fetched it
                record = self._records[shard]
                size = record["bytes"]
                _fetch(self.name(shard), path, record["sha256"], size, lambda file: self._reserve(file, size))

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Make room for a tar and take it, so that no other process counts on it."""
        with locked(self._locks / "room"):
            present = list(_present(self._cache))
            total = size + sum(each for _, each, _ in present)
            for used, each, path in sorted(present):
                if total <= self._most:
                    break
                if path.suffix == ".tar" or time.time() - used > _ABANDONED:
                    path.unlink(missing_ok=True)
                    total -= each
            file.truncate(size)


def fetch_description(url: str, directory: Path) -> None:
    """Fetch everything of remote shards but the tars into `directory`, verified, unless their manifest is there.

    Raises:
        UserError: they cannot be read or are not what their manifest says, or shards are half made in `directory`.
    """
    with locked(directory.with_name(f".{directory.name}.fetch")):
        if (directory / MANIFEST).exists():
            return
        if directory.exists():
            remedy = "finish them with train.stream.remote=null, or move them away"
            raise UserError(f"{directory} holds shards that were begun here", remedy)
        with new_directory(directory) as aside:
            _fetch(f"{_place(url)}/{MANIFEST}", aside / MANIFEST)
            for name, digest in _sidecars(url, aside).items():
                _fetch(f"{_place(url)}/{name}", aside / name, digest)


def _place(url: str) -> str:
    return url.rstrip("/")


def _sidecars(url: str, directory: Path) -> dict[str, str]:
    """What lies beside the tars, name to sha256, by the manifest that was just fetched."""
    try:
        files: dict[str, str] = read_manifest(directory, "shards")["files"]
    except UserError as error:
        raise UserError(error.problem.replace(str(directory), _place(url)), _AGAIN) from None
    strange = [name for name in files if "/" in name or name.startswith(".")]
    if strange:
        raise UserError(f"{_place(url)}/{MANIFEST}: {strange[0]!r} is no name of a file of shards", _AGAIN)
    return {name: digest for name, digest in files.items() if not name.endswith(".tar")}


def _present(cache: Path) -> Iterator[tuple[float, int, Path]]:
    """Time, size and path of each file in the cache; those being fetched have their full size at once."""
    for path in cache.iterdir():
        try:
            stat = path.stat()
        except FileNotFoundError:  # renamed by another process
            continue
        if path.is_file():
            yield stat.st_mtime, stat.st_size, path


def _fetch(
    url: str,
    path: Path,
    digest: str | None = None,
    most: int | None = None,
    reserve: Callable[[BinaryIO], None] | None = None,
) -> None:
    """Fetch a file, verify and rename it; a fetch that fails is tried once more."""
    try:
        _copy(url, path, digest, most, reserve)
    except UserError:
        _copy(url, path, digest, most, reserve)


def _copy(
    url: str, path: Path, digest: str | None, most: int | None, reserve: Callable[[BinaryIO], None] | None
) -> None:
    fetched = hashlib.sha256()
    with write_aside(path) as file:
        if reserve:
            reserve(file)
        for block in _blocks(url):
            if most is not None and file.tell() + len(block) > most:
                raise UserError(f"{url} is not what its manifest says (more than {most} bytes)", _AGAIN)
            fetched.update(block)
            file.write(block)
        if digest is not None and fetched.hexdigest() != digest:
            raise UserError(f"{url} is not what its manifest says (sha256 differs)", _AGAIN)


def _blocks(url: str) -> Iterator[bytes]:
    try:
        with fsspec.open(url, "rb") as file:  # no file system is kept: most do not survive a fork
            while block := file.read(_BLOCK):
                yield block
    except FileNotFoundError:
        raise UserError(f"{url} does not exist", _AGAIN) from None
    except Exception as error:  # every kind of store raises its own
        raise UserError(f"{url} cannot be read: {type(error).__name__}: {error}", _REACH) from None
