"""Verify shards against their manifest, their index and the prepared dataset, in one pass over each file.

Checking hashes runs at the speed of the disk, and only tars with a wrong hash are parsed. A deep check parses every
sample: it takes several times longer, and also finds wrong content whose hashes match.

Shape letters: S samples.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

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
from rarec.storage.artefacts import MANIFEST
from rarec.storage.files import sha256_file

_MAX_PADDING = 40 * BLOCK
"""Two tar records: the largest number of zero bytes after the last sample."""


class Problem(NamedTuple):
    """One problem: the file to rebuild, and a line that describes what is wrong."""

    file: str
    line: str


def verify_shards(
    directory: Path, manifest: Mapping[str, Any], expected: Expected, threads: int, deep: bool = False
) -> list[Problem]:
    """Verify a directory of shards; return the first problem of each file, sorted by file.

    Args:
        directory: directory of the shards.
        manifest: its manifest, from `read_manifest`.
        expected: expected content.
        threads: number of files read in parallel.
        deep: parse every sample.

    Raises:
        UserError: the manifest itself is malformed.
    """
    records = shard_records(directory, manifest)
    index, found = _index(directory, manifest)
    if index is not None and _is_unchanged(directory / INDEX, manifest["files"].get(INDEX, "")):
        found += [] if deep else [_unexpected_row(index, expected)]
    else:
        deep = True  # parse the tars to find the wrong row
    indexed = [None] * len(records) if index is None else split_by_shard(index, records)

    def tar(shard: int) -> Problem | None:
        if not deep and _is_unchanged(directory / tar_name(shard), records[shard]["sha256"]):
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
    """Report the first index row whose sample was not selected for its place."""
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
    return Problem(name, f"{name}: its bytes differ from what was written (sha256 differs)") if altered else None


def _is_unchanged(path: Path, digest: str) -> bool:
    return _file_problem(path, path.name, digest) is None


def _misplaced(directory: Path, manifest: Mapping[str, Any], expected: Expected) -> Iterator[Problem]:
    """Report files that are not in the manifest, and expected shards that the manifest lacks."""
    for path in directory.iterdir():
        if path.name not in {*manifest["files"], MANIFEST} and not path.name.startswith("."):
            yield Problem(path.name, f"{path.name} is not one of these shards' files")
    for name in map(tar_name, range(len(manifest["shards"]), expected.shards)):
        yield Problem(name, f"shard {name} is missing, and not listed in {MANIFEST}")


def index_tar(path: Path, shard: int) -> Entries:
    """Return the index rows of an intact tar, from the tar alone; (S,) of `ENTRY`."""
    rows, offset = [], 0
    with path.open("rb") as file:
        for key, extent in iterate_samples(file):
            rows.append(_row(Sample.parse(key, split_members(extent, key)), extent, offset, shard))
            offset += len(extent)
    return np.array(rows, ENTRY)


class TarCheck:
    """Read one tar from start to end without the index, and compare it with what is expected.

    Args:
        directory: directory of the shards.
        record: record of the tar in the manifest.
        shard: number of the tar.
        expected: expected content of all shards.
        indexed_S: rows of the index for this tar; None if the index cannot be read.
    """

    def __init__(
        self, directory: Path, record: Mapping[str, Any], shard: int, expected: Expected, indexed_S: Entries | None
    ) -> None:
        self.path, self.record, self.shard, self.expected = directory / tar_name(shard), record, shard, expected
        self.keys = expected.keys(shard)
        self.indexed = None if indexed_S is None else indexed_S.tolist()
        self.rows: list[tuple[int, ...]] = []
        self.index_mismatch: str | None = None

    def problem(self) -> Problem | None:
        """Return the first problem, or None."""
        name = self.path.name
        try:
            if not self.path.is_file():
                return Problem(name, f"shard {name} is missing")
            with self.path.open("rb") as file:
                return self._compare_manifest(self._read(file))
        except OSError as error:
            return Problem(name, f"shard {name} cannot be read: {error.strerror}")
        except ValueError as error:
            return Problem(name, f"shard {name}, {error}")

    def _read(self, file: BinaryIO) -> dict[str, Any]:
        """Return the record of the tar. Raise ValueError for the first sample that is not as expected."""
        whole, offset, size = hashlib.sha256(), 0, os.fstat(file.fileno()).st_size
        if size > self.record["bytes"] + MAX_SAMPLE_BYTES:
            raise ValueError(f"it has {size} bytes, but {self.record['bytes']} were written")
        for key, extent in iterate_samples(file):
            whole.update(extent)
            self._sample(key, extent, offset)
            offset += len(extent)
        file.seek(offset)
        rest = file.read(_MAX_PADDING + 1)
        whole.update(rest)
        if len(self.rows) < len(self.keys):
            raise ValueError(self._missing_sample(rest))
        if not 2 * BLOCK <= len(rest) <= _MAX_PADDING or rest.strip(b"\0"):
            raise ValueError("after its last sample: the end of the tar is malformed")
        return shard_record(self.path.name, np.array(self.rows, ENTRY), offset + len(rest), whole.hexdigest())

    def _missing_sample(self, rest: bytes) -> str:
        """Describe the missing sample that should come next, given the bytes in its place."""
        key, found = self.keys[len(self.rows)], rest[:40].rstrip(b"\0")
        if found.startswith(f"{key}.".encode()):
            return f"sample {key}: it is truncated"
        return f"sample {key}: it is missing" + (f"; found {found!r} instead" if found else "")

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
            self.index_mismatch = self.index_mismatch or key
        mismatch = None if self.index_mismatch else self.expected.mismatch(sample)
        if mismatch:
            raise ValueError(f"sample {key}: {mismatch}")

    def _compare_manifest(self, record: dict[str, Any]) -> Problem | None:
        name, key = record["file"], self.index_mismatch
        if record["sha256"] != self.record["sha256"]:
            what = f"shard {name}, sample {key}" if key else f"shard {name}"
            return Problem(name, f"{what}: its bytes differ from what was written (sha256 differs)")
        if key:
            return Problem(INDEX, f"{INDEX}, shard {name}, sample {key}: the row does not match the tar")
        if record != self.record:
            return Problem(name, f"shard {name}: its record in {MANIFEST} does not match the tar")
        return None


def _row(sample: Sample, extent: bytes, offset: int, shard: int) -> tuple[int, ...]:
    """Return the values of an `ENTRY`."""
    return shard, offset, len(extent), len(sample.tokens_T), sample.user, sample.position, digest_of(extent)
