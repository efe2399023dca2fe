"""Are shards what their manifest, their index and the prepared dataset say? One pass over each file, some at a time.

Hashes alone are checked at the speed of the disk, and only a tar that is not as it was written is looked into. To look
into every sample takes several times longer, and finds what was written wrong, whatever the hashes say.

Shape letters: S samples.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rarec.artefacts import MANIFEST
from rarec.data.shards.expected import Expected
from rarec.data.shards.index import (
    ENTRY,
    INDEX,
    Entries,
    digest_of,
    key_of,
    open_index,
    shard_records,
    split_by_shard,
    tar_name,
)
from rarec.data.shards.samples import Sample, shard_record
from rarec.data.shards.tar_members import BLOCK, MAX_SAMPLE_BYTES, iterate_samples, split_members
from rarec.errors import UserError
from rarec.files import sha256_file

_MOST_AFTER = 40 * BLOCK
"""Two of tar's records: more zeros never follow the last sample."""


class Problem(NamedTuple):
    """One thing that is wrong: the file that must be made again, and a line that says what it is."""

    file: str
    line: str


def verify_shards(
    directory: Path, manifest: Mapping[str, Any], expected: Expected, threads: int, deep: bool = False
) -> list[Problem]:
    """What is wrong with a directory of shards: the first thing of each file, by file.

    Args:
        directory: of the shards.
        manifest: theirs, as `read_manifest` read it.
        expected: what they should hold.
        threads: files read at a time.
        deep: look into every sample.

    Raises:
        UserError: the manifest itself is garbled.
    """
    records = shard_records(directory, manifest)
    index, found = _index(directory, manifest)
    if index is not None and _as_written(directory / INDEX, manifest["files"].get(INDEX, "")):
        found += [] if deep else [_unexpected_row(index, expected)]
    else:
        deep = True  # the tars tell which row it is
    indexed = [None] * len(records) if index is None else split_by_shard(index, records)

    def tar(shard: int) -> Problem | None:
        if not deep and _as_written(directory / tar_name(shard), records[shard]["sha256"]):
            return None
        return TarCheck(directory, records[shard], shard, expected, indexed[shard]).problem()

    def other(name: str) -> Problem | None:
        return _file_problem(directory / name, name, manifest["files"][name])

    with ThreadPoolExecutor(threads) as pool:
        found += pool.map(tar, range(len(records)))
        found += pool.map(other, sorted(set(manifest["files"]) - {record["file"] for record in records}))
    found += _misplaced(directory, manifest, expected)
    first: dict[str, Problem] = {}
    for problem in filter(None, found):
        first.setdefault(problem.file, problem)
    return [first[file] for file in sorted(first)]


def _index(directory: Path, manifest: Mapping[str, Any]) -> tuple[Entries | None, list[Problem | None]]:
    try:
        return open_index(directory, manifest), []
    except UserError as error:
        return None, [Problem(INDEX, error.problem)]


def _unexpected_row(index_S: Entries, expected: Expected) -> Problem | None:
    """An index row of a sample that should not be there."""
    row = expected.first_unexpected(index_S["user"], index_S["position"])
    if row is None:
        return None
    shard, key = tar_name(int(index_S[row]["shard"])), key_of(index_S[row])
    return Problem(INDEX, f"{INDEX}, shard {shard}, sample {key}: it was not selected for this place")


def _file_problem(path: Path, name: str, digest: str) -> Problem | None:
    try:
        if not path.is_file():
            return Problem(name, f"{name} is missing")
        altered = sha256_file(path) != digest
    except OSError as error:
        return Problem(name, f"{name} cannot be read: {error.strerror}")
    return Problem(name, f"{name}: its bytes are not those that were written (sha256 differs)") if altered else None


def _as_written(path: Path, digest: str) -> bool:
    return _file_problem(path, path.name, digest) is None


def _misplaced(directory: Path, manifest: Mapping[str, Any], expected: Expected) -> Iterator[Problem]:
    """Files that the manifest does not know, and shards that it should know."""
    for path in directory.iterdir():
        if path.name not in {*manifest["files"], MANIFEST} and not path.name.startswith("."):
            yield Problem(path.name, f"{path.name} is no part of these shards")
    for name in map(tar_name, range(len(manifest["shards"]), expected.shards)):
        yield Problem(name, f"shard {name} is missing, and {MANIFEST} does not know of it")


def index_tar(path: Path, shard: int) -> Entries:
    """The index rows of an intact tar, from the tar alone; (S,) of `ENTRY`."""
    rows, offset = [], 0
    with path.open("rb") as file:
        for key, extent in iterate_samples(file):
            rows.append(_row(Sample.parse(key, split_members(extent, key)), extent, offset, shard))
            offset += len(extent)
    return np.array(rows, ENTRY)


class TarCheck:
    """Reads one tar from its first byte to its last, without help of the index, and compares.

    Args:
        directory: of the shards.
        record: the tar's, from the manifest.
        shard: its number.
        expected: what all shards should hold.
        indexed_S: the tar's rows of the index, where that can be read.
    """

    def __init__(
        self, directory: Path, record: Mapping[str, Any], shard: int, expected: Expected, indexed_S: Entries | None
    ) -> None:
        self.path, self.record, self.shard, self.expected = directory / tar_name(shard), record, shard, expected
        self.keys = expected.keys(shard)
        self.indexed = None if indexed_S is None else indexed_S.tolist()
        self.rows: list[tuple[int, ...]] = []
        self.unlike_index: str | None = None

    def problem(self) -> Problem | None:
        """What is wrong first, if anything."""
        name = self.path.name
        try:
            if not self.path.is_file():
                return Problem(name, f"shard {name} is missing")
            with self.path.open("rb") as file:
                return self._unlike_manifest(self._read(file))
        except OSError as error:
            return Problem(name, f"shard {name} cannot be read: {error.strerror}")
        except ValueError as error:
            return Problem(name, f"shard {name}, {error}")

    def _read(self, file: BinaryIO) -> dict[str, Any]:
        """The tar's record. A ValueError names the first sample that is not what it should be."""
        whole, offset, size = hashlib.sha256(), 0, os.fstat(file.fileno()).st_size
        if size > self.record["bytes"] + MAX_SAMPLE_BYTES:
            raise ValueError(f"it has {size} bytes, but {self.record['bytes']} were written")
        for key, extent in iterate_samples(file):
            whole.update(extent)
            self._sample(key, extent, offset)
            offset += len(extent)
        file.seek(offset)
        rest = file.read(_MOST_AFTER + 1)
        whole.update(rest)
        if len(self.rows) < len(self.keys):
            raise ValueError(self._absence(rest))
        if not 2 * BLOCK <= len(rest) <= _MOST_AFTER or rest.strip(b"\0"):
            raise ValueError("after its last sample: something else than the end of a tar")
        return shard_record(self.path.name, np.array(self.rows, ENTRY), offset + len(rest), whole.hexdigest())

    def _absence(self, rest: bytes) -> str:
        """Of the sample that should come next, where instead this does."""
        key, stands = self.keys[len(self.rows)], rest[:40].rstrip(b"\0")
        if stands.startswith(f"{key}.".encode()):
            return f"sample {key}: it is torn"
        return f"sample {key}: it is missing" + (f"; in its place stands {stands!r}" if stands else "")

    def _sample(self, key: str, extent: bytes, offset: int) -> None:
        place = len(self.rows)
        try:
            sample = Sample.parse(key, split_members(extent, key))
        except ValueError as error:
            raise ValueError(f"sample {key}: {error}") from None
        if key not in self.keys[place : place + 1]:
            wanted = self.keys[place] if place < len(self.keys) else "none"
            what = self.expected.mismatch(sample) or f"it was not selected for this place, but {wanted}"
            raise ValueError(f"sample {key}: {what}")
        self.rows.append(_row(sample, extent, offset, self.shard))
        if self.indexed is not None and self.indexed[place : place + 1] != self.rows[-1:]:
            self.unlike_index = self.unlike_index or key
        lie = None if self.unlike_index else self.expected.mismatch(sample)
        if lie:
            raise ValueError(f"sample {key}: {lie}")

    def _unlike_manifest(self, record: dict[str, Any]) -> Problem | None:
        name, key = record["file"], self.unlike_index
        if record["sha256"] != self.record["sha256"]:
            what = f"shard {name}, sample {key}" if key else f"shard {name}"
            return Problem(name, f"{what}: its bytes are not those that were written (sha256 differs)")
        if key:
            return Problem(INDEX, f"{INDEX}, shard {name}, sample {key}: the row is not what the tar gives")
        if record != self.record:
            return Problem(name, f"shard {name}: its record in {MANIFEST} is not what the tar gives")
        return None


def _row(sample: Sample, extent: bytes, offset: int, shard: int) -> tuple[int, ...]:
    """What `ENTRY` holds."""
    return shard, offset, len(extent), len(sample.tokens_T), sample.user, sample.position, digest_of(extent)
