"""The files of shards, the index and the tars, in a directory or behind an fsspec URL, and their samples by number.

The index, `samples.npy`, has one row per sample in the order of the tars, and is memory-mapped: a reader fetches
exactly the bytes of the samples that it needs, and verifies each. No tar is opened before it is needed.

Behind a URL, the files that describe the shards are fetched first, tars on demand into a directory of bounded size
that processes share. Every cached tar is complete and verified; the least recently opened one is evicted first. A tar
that is evicted while another process reads it remains readable there until it is closed.

Shape letters: S samples, n samples that are read together.
"""

import hashlib
import os
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np

from rarec.config.schema import Stream
from rarec.data.shards.batch_plan import SHUFFLED_TOGETHER, Numbers
from rarec.data.shards.samples import INDEX_ROW, REPAIR, IndexRows, Sample, key_of, read_sample
from rarec.data.tables import map_npy, release_pages, write_npy
from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST, read_manifest
from rarec.storage.directories import MARKER, new_directory
from rarec.storage.files import atomic_write, is_temporary, locked, open_file

INDEX = "samples.npy"
MAX_OPEN = 2 * SHUFFLED_TOGETHER
"""Number of tars kept open for each part of the users: a window of its plan spans two groups of shards, unless they
are tiny."""
_BLOCK = 2**22
_LOCKS = 64
"""Number of locks, and so of tars that can be fetched in parallel."""
_ABANDONED = 3600
"""Seconds without a write after which a fetch counts as dead."""
_CHECK_ACCESS = (
    "check train.stream.remote, the network, and the credentials that fsspec finds; then run the same command to resume"
)
_COPY_AGAIN = (
    "correct train.stream.remote, copy the complete run.dir/shards there again, or fetch its description again: "
    "rarec shards CONFIG --fresh"
)


def tar_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"{shard:06d}.tar"


def write_index(directory: Path, parts: Iterable[IndexRows], samples: int) -> None:
    """Write the index shard by shard, so that it need not fit in memory.

    Args:
        directory: directory of the shards.
        parts: index rows of each shard, in order.
        samples: total number of rows.
    """
    with atomic_write(directory / INDEX) as file:
        write_npy(file, INDEX_ROW, samples, parts)


def open_index(directory: Path, manifest: Mapping[str, Any]) -> IndexRows:
    """Map the index of the shards that a manifest describes.

    Returns:
        (S,) rows of type `INDEX_ROW`.

    Raises:
        UserError: the index is missing, malformed, or of other shards.
    """
    path = directory / INDEX
    index_S: IndexRows = map_npy(path, REPAIR)
    if index_S.dtype != INDEX_ROW or index_S.shape != (manifest["samples"],):
        raise UserError(f"{path} is not the index of {manifest['samples']} samples", REPAIR)
    return index_S


class Tars:
    """The tars in a directory, by number."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def name(self, shard: int) -> str:
        """Return the path or URL of a tar, for messages."""
        return str(self.directory / tar_name(shard))

    def open(self, shard: int) -> BinaryIO:
        """Open a tar for reading.

        Raises:
            UserError: the tar is missing or cannot be read.
        """
        try:
            return open_file(self.directory / tar_name(shard))
        except OSError as error:
            raise UserError(f"shard {self.name(shard)} cannot be read: {error.strerror}", REPAIR) from None

    def drop_cached(self, shard: int) -> bool:
        """Drop the cached copy of a damaged tar; return False if there is no other copy."""
        return False


class RemoteTars(Tars):
    """Tars behind a URL, fetched into a cache when they are opened.

    Args:
        url: URL of the directory of shards.
        records: records of the shards, from their manifest.
        cache: directory of the fetched tars, shared by processes.
        max_bytes: largest size of the cache in bytes.
        most: number of tars that are open at the same time.

    Raises:
        UserError: the cache is too small for the tars that are open at the same time.
    """

    def __init__(
        self, url: str, records: Sequence[Mapping[str, Any]], cache: Path, max_bytes: int, most: int = MAX_OPEN
    ) -> None:
        super().__init__(cache)
        needed = sum(sorted(record["bytes"] for record in records)[-most:])
        if needed > max_bytes:
            problem = f"train.stream.cache_gb = {max_bytes / 1e9:g} is too small for {most} open tars"
            raise UserError(problem, f"raise it to {needed / 1e9:.3g} or more, or lower shards.samples_per_shard")
        self._url, self._records, self._max_bytes = url.rstrip("/"), records, max_bytes
        self._locks = cache / "locks"
        with locked(cache.with_name(f".{cache.name}.lock")):
            if not (cache / MARKER).exists():
                with new_directory(cache, ["locks/"]):  # refuses what rarec has not made
                    pass

    def name(self, shard: int) -> str:
        """Return the URL of a tar."""
        return f"{self._url}/{tar_name(shard)}"

    def open(self, shard: int) -> BinaryIO:
        """Open a tar; fetch it if it is not cached.

        Raises:
            UserError: the tar cannot be fetched, or does not match the manifest.
        """
        path = self.directory / tar_name(shard)
        while True:
            try:
                os.utime(path)  # records the last use
                return path.open("rb")
            except FileNotFoundError:  # not yet fetched, or evicted
                self._fetch(shard, path)

    def drop_cached(self, shard: int) -> bool:
        """Drop the cached copy of a tar; the next `open` fetches it again."""
        (self.directory / tar_name(shard)).unlink(missing_ok=True)
        return True

    def _fetch(self, shard: int, path: Path) -> None:
        with locked(self._locks / str(shard % _LOCKS)):
            if not path.exists():  # another process may have fetched it meanwhile
                record = self._records[shard]
                _fetch(self.name(shard), path, record["sha256"], lambda file: self._reserve(file, record["bytes"]))

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Reserve room by extending the file, so that other processes count it, and evict tars to make that room."""
        with locked(self._locks / "room"):
            file.truncate(size)
            present = sorted(_tars_with_sizes(self.directory))
            excess = sum(size for _, size, _ in present) - self._max_bytes
            for used, size, path in present:
                if excess > 0 and (path.suffix == ".tar" or time.time() - used > _ABANDONED):
                    path.unlink(missing_ok=True)
                    excess -= size


class ShardDataset:
    """The samples of some shards by number, each checked against the index.

    Args:
        index_S: location of each sample, from `open_index`.
        tars: the tars.
        most: number of tars that are kept open.
    """

    def __init__(self, index_S: IndexRows, tars: Tars, most: int = MAX_OPEN) -> None:
        self.index_S, self.tars, self._most = index_S, tars, most
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index_S)

    def __getitem__(self, number: int) -> Sample:
        """Return a sample.

        Raises:
            UserError: it does not match the index; the message names its shard and key.
        """
        row = self.index_S[number]
        shard = int(row["shard"])
        name = self.tars.name(shard)
        try:
            return read_sample(self._extent(row), row, name)
        except UserError:
            self._close(shard)
            if not self.tars.drop_cached(shard):
                raise
        return read_sample(self._extent(row), row, name)

    def read(self, numbers_n: Numbers) -> list[Sample]:
        """Return the samples with these numbers; see `__getitem__`."""
        samples = [self[number] for number in numbers_n.tolist()]
        release_pages(self.index_S)
        return samples

    def damaged(self, shards: Iterable[int], threads: int) -> list[int]:
        """Return the numbers of the samples of some shards that cannot be read, or do not match the index.

        Args:
            shards: numbers of the shards.
            threads: number of shards read in parallel.

        Raises:
            OSError: a tar that may be whole cannot be opened.
        """
        with ThreadPoolExecutor(threads) as pool:
            return [number for numbers in pool.map(self._damaged_in, shards) for number in numbers]

    def _damaged_in(self, shard: int) -> list[int]:
        shard_S = self.index_S["shard"]
        numbers = range(bisect_left(shard_S, shard), bisect_left(shard_S, shard + 1))
        samples = ShardDataset(self.index_S, self.tars)  # with an open file of its own
        damaged = [number for number in numbers if not samples._is_intact(number)]
        samples._close(shard)
        return damaged

    def _is_intact(self, number: int) -> bool:
        try:
            self[number]
        except UserError:
            path = self.tars.directory / tar_name(int(self.index_S[number]["shard"]))
            if os.path.lexists(path):
                open_file(path).close()  # raises the system's error where a tar that may be whole cannot be opened
            return False
        return True

    def _extent(self, row: np.void) -> bytes:
        """Return the bytes at a sample's place; fewer if the tar ends earlier."""
        shard = int(row["shard"])
        if shard not in self._open:
            self._open[shard] = self.tars.open(shard)
            if len(self._open) > self._most:
                self._close(next(iter(self._open)))
        self._open.move_to_end(shard)
        try:
            return os.pread(self._open[shard].fileno(), int(row["size"]), int(row["offset"]))
        except OSError as error:  # a bad sector
            raise UserError(f"shard {self.tars.name(shard)}, sample {key_of(row)}: {error}", REPAIR) from None

    def _close(self, shard: int) -> None:
        if shard in self._open:
            self._open.pop(shard).close()


def open_samples(stream: Stream, directory: Path, manifest: Mapping[str, Any], cache: Path) -> ShardDataset:
    """Open the samples of shards.

    Args:
        stream: the section `train.stream`.
        directory: directory of the shards.
        manifest: manifest of the shards.
        cache: directory for tars that are fetched from `train.stream.remote`.

    Raises:
        UserError: the index does not belong to these shards, or the fields of `train.stream` contradict each other.
    """
    tars, most = Tars(directory), MAX_OPEN * manifest["settings"]["folds"]
    if stream.remote is not None:
        if stream.damaged == "skip":
            problem = "train.stream: `damaged: skip` needs local tars, but `remote` is set"
            raise UserError(problem, "set train.stream.damaged=refuse, or read a local copy: train.stream.remote=null")
        tars = RemoteTars(stream.remote, manifest["shards"], cache, int(stream.cache_gb * 1e9), most)
    return ShardDataset(open_index(directory, manifest), tars, most)


def fetch_description(url: str, directory: Path, fresh: bool = False) -> None:
    """Fetch and verify all files of remote shards except the tars, unless their manifest is already there.

    Args:
        url: URL of the directory of shards.
        directory: local directory for the files.
        fresh: fetch them anew, and replace what rarec has in the directory.

    Raises:
        UserError: a file cannot be read or does not match the manifest, or `directory` has unfinished local shards.
    """
    url = url.rstrip("/")
    with locked(directory.with_name(f".{directory.name}.fetch")):
        if (directory / MANIFEST).exists() and not fresh:
            return
        if directory.exists() and not fresh:
            remedy = "finish them with train.stream.remote=null, or move them away"
            raise UserError(f"{directory} contains unfinished shards of this machine", remedy)
        with new_directory(directory) as temporary:
            _fetch(f"{url}/{MANIFEST}", temporary / MANIFEST)
            try:
                files: dict[str, str] = read_manifest(temporary, "shards")["files"]
            except UserError as error:
                raise UserError(error.problem.replace(str(temporary), url), _COPY_AGAIN) from None
            for name, sha256 in files.items():
                if not name.endswith(".tar"):
                    _fetch(f"{url}/{name}", temporary / name, sha256)


def _tars_with_sizes(cache: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield time, size and path of each tar in the cache; those being fetched already have their full size."""
    for path in cache.iterdir():
        if (path.suffix == ".tar" and path.stem.isdigit()) or is_temporary(path):
            try:
                stat = path.stat()
            except FileNotFoundError:  # renamed or evicted by another process
                continue
            yield stat.st_mtime, stat.st_size, path


def _fetch(
    url: str, path: Path, sha256: str = "", reserve: Callable[[BinaryIO], None] = lambda file: None, tries: int = 2
) -> None:
    """Fetch a file, verify it and rename it; try once more on failure."""
    fetched = hashlib.sha256()
    try:
        with atomic_write(path) as file:
            reserve(file)
            for block in read_blocks(url):
                fetched.update(block)
                file.write(block)
            if sha256 and fetched.hexdigest() != sha256:
                raise UserError(f"{url} does not match its manifest (sha256 differs)", _COPY_AGAIN)
    except UserError:
        if tries == 1:
            raise
        _fetch(url, path, sha256, reserve, tries - 1)


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
