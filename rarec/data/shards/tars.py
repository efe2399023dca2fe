"""Open the tars of shards, in a local directory or behind an fsspec URL.

Behind a URL, the files that describe the shards are fetched first, tars on demand into a directory of bounded size that
processes share. Every cached tar is complete and verified; the least recently opened one is evicted first. A tar
that is evicted while another process reads it remains readable there until it is closed.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

from rarec.data.shards.batch_plan import SHUFFLED_TOGETHER
from rarec.data.shards.index import REPAIR, is_tar_name, tar_name
from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST, read_manifest
from rarec.storage.directories import MARKER, new_directory
from rarec.storage.files import atomic_write, is_temporary, locked

MAX_OPEN = 2 * SHUFFLED_TOGETHER
"""Number of tars kept open: a window of the plan spans two groups of shards, unless they are tiny."""
_BLOCK = 2**22
_LOCKS = 64
"""Number of locks, and so of tars that can be fetched in parallel."""
_ABANDONED = 3600
"""Seconds without a write after which a fetch counts as dead."""
_CHECK_ACCESS = (
    "check train.stream.remote, the network, and the credentials that fsspec finds; then run the same command to resume"
)
_COPY_AGAIN = (
    "copy the complete run.dir/shards there again, or fetch its description again: rarec shards CONFIG --fresh"
)


class Tars(Protocol):
    """Open the tars of some shards by number."""

    def name(self, shard: int) -> str:
        """Return the name of a tar in messages."""

    def open(self, shard: int) -> BinaryIO:
        """Open a tar for reading."""

    def drop_cached(self, shard: int) -> bool:
        """Drop the cached copy of a damaged tar; return False if there is no other copy."""


class LocalTars:
    """Tars in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def name(self, shard: int) -> str:
        """See `Tars`: the path."""
        return str(self.directory / tar_name(shard))

    def open(self, shard: int) -> BinaryIO:
        """See `Tars`.

        Raises:
            UserError: the tar is missing or cannot be read.
        """
        try:
            handle = os.open(self.name(shard), os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block forever
            return os.fdopen(handle, "rb")
        except FileNotFoundError:
            raise UserError(f"shard {self.name(shard)} is missing", REPAIR) from None
        except OSError as error:
            raise UserError(f"shard {self.name(shard)} cannot be read: {error.strerror}", REPAIR) from None

    def drop_cached(self, shard: int) -> bool:
        """See `Tars`: there is no other copy."""
        return False


class RemoteTars:
    """Tars behind a URL, fetched into a cache when they are opened.

    Args:
        url: URL of the directory of shards.
        records: records of the shards, from their manifest.
        cache: directory of the fetched tars, shared by processes.
        max_bytes: largest size of the cache in bytes.

    Raises:
        UserError: the cache is too small for the tars that are open at the same time.
    """

    def __init__(self, url: str, records: Sequence[Mapping[str, Any]], cache: Path, max_bytes: int) -> None:
        needed = sum(sorted(record["bytes"] for record in records)[-MAX_OPEN:])
        if needed > max_bytes:
            problem = f"train.stream.cache_gb = {max_bytes / 1e9:g} is too small for {MAX_OPEN} open tars"
            raise UserError(problem, f"raise it to {needed / 1e9:.3g} or more, or lower shards.samples_per_shard")
        self._url, self._records, self._cache, self._max_bytes = _base_url(url), records, cache, max_bytes
        self._locks = cache / "locks"
        with locked(cache.with_name(f".{cache.name}.lock")):
            if not (cache / MARKER).exists():
                with new_directory(cache, ["locks/"]):  # refuses what rarec has not made
                    pass
        self._locks.mkdir(exist_ok=True)

    def name(self, shard: int) -> str:
        """See `Tars`: the URL."""
        return f"{self._url}/{tar_name(shard)}"

    def open(self, shard: int) -> BinaryIO:
        """See `Tars`; fetch the tar if it is not cached.

        Raises:
            UserError: the tar cannot be fetched, or does not match the manifest.
        """
        path = self._cache / tar_name(shard)
        while True:
            try:
                os.utime(path)  # records the last use
                return path.open("rb")
            except FileNotFoundError:  # not yet fetched, or evicted
                self._fetch(shard, path)

    def drop_cached(self, shard: int) -> bool:
        """See `Tars`; the next `open` fetches the tar again."""
        (self._cache / tar_name(shard)).unlink(missing_ok=True)
        return True

    def _fetch(self, shard: int, path: Path) -> None:
        with locked(self._locks / str(shard % _LOCKS)):
            if not path.exists():  # another process may have fetched it meanwhile
                record = self._records[shard]
                size = record["bytes"]
                _fetch(self.name(shard), path, record["sha256"], size, lambda file: self._reserve(file, size))

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Evict tars to make room, and reserve it by extending the file, so that other processes count it."""
        with locked(self._locks / "room"):
            present = list(_present(self._cache))
            total = size + sum(each for _, each, _ in present)
            for used, each, path in sorted(present):
                if total <= self._max_bytes:
                    break
                if path.suffix == ".tar" or time.time() - used > _ABANDONED:
                    path.unlink(missing_ok=True)
                    total -= each
            file.truncate(size)


def fetch_description(url: str, directory: Path) -> None:
    """Fetch and verify all files of remote shards except the tars, unless their manifest is already there.

    Args:
        url: URL of the directory of shards.
        directory: local directory for the files.

    Raises:
        UserError: a file cannot be read or does not match the manifest, or `directory` has unfinished local shards.
    """
    with locked(directory.with_name(f".{directory.name}.fetch")):
        if (directory / MANIFEST).exists():
            return
        if directory.exists():
            remedy = "finish them with train.stream.remote=null, or move them away"
            raise UserError(f"{directory} contains unfinished shards of this machine", remedy)
        with new_directory(directory) as temporary:
            _fetch(f"{_base_url(url)}/{MANIFEST}", temporary / MANIFEST)
            for name, digest in _sidecars(url, temporary).items():
                _fetch(f"{_base_url(url)}/{name}", temporary / name, digest)


def _base_url(url: str) -> str:
    return url.rstrip("/")


def _sidecars(url: str, directory: Path) -> dict[str, str]:
    """Return name and sha256 of the files besides the tars, from the fetched manifest."""
    try:
        files: dict[str, str] = read_manifest(directory, "shards")["files"]
    except UserError as error:
        raise UserError(error.problem.replace(str(directory), _base_url(url)), _COPY_AGAIN) from None
    strange = [name for name in files if "/" in name or name.startswith(".")]
    if strange:
        raise UserError(f"{_base_url(url)}/{MANIFEST}: {strange[0]!r} is not a valid file name of shards", _COPY_AGAIN)
    return {name: digest for name, digest in files.items() if not name.endswith(".tar")}


def _present(cache: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield time, size and path of each tar in the cache; those being fetched already have their full size."""
    for path in cache.iterdir():
        if not (is_tar_name(path.name) or is_temporary(path)):
            continue
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
    max_bytes: int | None = None,
    reserve: Callable[[BinaryIO], None] | None = None,
) -> None:
    """Fetch a file, verify it and rename it; try once more on failure."""
    try:
        _copy(url, path, digest, max_bytes, reserve)
    except UserError:
        _copy(url, path, digest, max_bytes, reserve)


def _copy(
    url: str, path: Path, digest: str | None, max_bytes: int | None, reserve: Callable[[BinaryIO], None] | None
) -> None:
    fetched = hashlib.sha256()
    with atomic_write(path) as file:
        if reserve:
            reserve(file)
        for block in read_blocks(url):
            if max_bytes is not None and file.tell() + len(block) > max_bytes:
                raise UserError(f"{url} does not match its manifest (more than {max_bytes} bytes)", _COPY_AGAIN)
            fetched.update(block)
            file.write(block)
        if digest is not None and fetched.hexdigest() != digest:
            raise UserError(f"{url} does not match its manifest (sha256 differs)", _COPY_AGAIN)


def read_blocks(url: str) -> Iterator[bytes]:
    """Yield the content of a URL in blocks.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with fsspec.open(url, "rb") as file:  # not reused: most file systems do not survive a fork
            while block := file.read(_BLOCK):
                yield block
    except FileNotFoundError:
        raise UserError(f"{url} does not exist", _COPY_AGAIN) from None
    except Exception as error:  # every store has its own exceptions
        raise UserError(f"{url} cannot be read: {type(error).__name__}: {error}", _CHECK_ACCESS) from None
