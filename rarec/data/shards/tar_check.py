"""One tar read from end to end, without the index: what it holds, and what of that is not so.

Shape letters: S samples.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rarec.artefacts import MANIFEST
from rarec.data.shards.index import ENTRY, INDEX, Entries, digest_of, tar_name
from rarec.data.shards.members import BLOCK, MOST_SAMPLE, members, walk
from rarec.data.shards.samples import Sample, shard_record
from rarec.data.shards.truth import Truth

_MOST_AFTER = 40 * BLOCK
"""Two of tar's records: more zeros never follow the last sample."""


class Problem(NamedTuple):
    """One thing that is wrong: the file that must be made again, and a line that says what it is."""

    file: str
    line: str


def scan(path: Path, shard: int) -> Entries:
    """The index rows of an intact tar, from the tar alone; (S,) of `ENTRY`."""
    rows, offset = [], 0
    with path.open("rb") as file:
        for key, extent in walk(file):
            rows.append(_row(Sample.parse(key, members(extent, key)), extent, offset, shard))
            offset += len(extent)
    return np.array(rows, ENTRY)


class TarCheck:
    """Reads one tar from its first byte to its last, without help of the index, and compares.

    Args:
        directory: of the shards.
        record: the tar's, from the manifest.
        shard: its number.
        truth: what all shards should hold.
        indexed_S: the tar's rows of the index, where that can be read.
    """

    def __init__(
        self, directory: Path, record: Mapping[str, Any], shard: int, truth: Truth, indexed_S: Entries | None
    ) -> None:
        self.path, self.record, self.shard, self.truth = directory / tar_name(shard), record, shard, truth
        self.keys = truth.keys(shard)
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
        if size > self.record["bytes"] + MOST_SAMPLE:
            raise ValueError(f"it has {size} bytes, but {self.record['bytes']} were written")
        for key, extent in walk(file):
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
            sample = Sample.parse(key, members(extent, key))
        except ValueError as error:
            raise ValueError(f"sample {key}: {error}") from None
        if key not in self.keys[place : place + 1]:
            wanted = self.keys[place] if place < len(self.keys) else "none"
            what = self.truth.lie(sample) or f"it was not selected for this place, but {wanted}"
            raise ValueError(f"sample {key}: {what}")
        self.rows.append(_row(sample, extent, offset, self.shard))
        if self.indexed is not None and self.indexed[place : place + 1] != self.rows[-1:]:
            self.unlike_index = self.unlike_index or key
        lie = None if self.unlike_index else self.truth.lie(sample)
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
