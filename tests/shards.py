"""Write shards of synthetic samples, read them, and change them with or without updating the hashes."""

import hashlib
import io
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rarec.config.schema import Train
from rarec.data.selection import Selection
from rarec.data.shards import writing
from rarec.data.shards.batch_plan import BatchPlan, Column, ShardPlan
from rarec.data.shards.files import INDEX, ShardDataset, Tars, open_index, tar_name, write_index
from rarec.data.shards.samples import INDEX_ROW, Sample, write_tar
from rarec.storage.artefacts import MANIFEST, PROGRESS, SEAL, read_manifest, sha256_json, write_manifest, write_sealed
from rarec.storage.files import read_json, sha256_file
from tests.datasets import by_hand

ITEMS = 13


def made_sample(number: int, **other: Any) -> Sample:
    """The same for the same number."""
    history = np.arange(number % 5 + 1, dtype=np.int32)
    fields = {
        "user": number,
        "position": len(history),
        "target": number % ITEMS,
        "history_H": history,
        "tokens_T": np.arange(7 + number * 7 % 11, dtype=np.int32),
        "marks": {"id": 1},
        "states_LD": np.full((2, 4), number, np.float16),
        "vectors": {"id": np.full((1, 3), number, np.float32)},
    }
    return Sample(**fields | other)


def write_shards(directory: Path, sizes: Iterable[int], sidecars: dict[str, bytes] | None = None) -> dict[str, Any]:
    """Shards of these sizes, numbered on; returns their manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    records, rows, total = [], [], 0
    for shard, size in enumerate(sizes):
        record, own = write_tar(directory / tar_name(shard), map(made_sample, range(total, total + size)), shard)
        records.append(record)
        rows.append(own)
        total += size
    write_index(directory, rows, total)
    for name, content in (sidecars or {}).items():
        (directory / name).write_bytes(content)
    return finish(directory, records, sidecars or ())


def finish(directory: Path, records: list[dict[str, Any]], sidecars: Iterable[str] = ()) -> dict[str, Any]:
    """Write the manifest, and drop the notes of progress."""
    figures, files = writing.describe_shards(records, sidecars)
    manifest = write_manifest(directory, "shards", settings={}, made_from={}, files=files, **figures)
    shutil.rmtree(directory / PROGRESS, ignore_errors=True)
    return manifest


@dataclass
class Stream:
    """A plan, and the samples by number."""

    plan: BatchPlan
    samples: ShardDataset

    def epoch(self, epoch: int, first_step: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[Sample]]:
        """A rank's part of each batch."""
        for batch in self.plan.batches(epoch, first_step):
            yield self.samples.read(self.plan.share(batch, rank, world))


def plan_of(
    shard_S: Column, tokens_S: Column, seed: int, slots: int = 0, excluded: Iterable[int] = (), **train: Any
) -> BatchPlan:
    """A plan with these fields of `train`."""
    return ShardPlan(shard_S, tokens_S, seed, Train(**train), slots, excluded)


def open_stream(directory: Path, manifest: dict[str, Any], tars: Tars | None = None, **plan: Any) -> Stream:
    """A stream over shards on disk."""
    index_S = open_index(directory, manifest)
    made = plan_of(index_S["shard"], index_S["tokens"], plan.pop("seed", 3), **{"batch_size": 8} | plan)
    return Stream(made, ShardDataset(index_S, tars or Tars(directory)))


def users(batches: Iterable[Iterable[Sample]]) -> list[list[int]]:
    """The samples' numbers, batch by batch."""
    return [[sample.user for sample in batch] for batch in batches]


def bytes_of(directory: Path) -> dict[str, bytes]:
    """The content of all files, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def sign(directory: Path, **figures: Any) -> None:
    """Update the manifest to match the files."""
    manifest = read_json(directory / MANIFEST) | figures
    manifest["files"] = {
        path.relative_to(directory).as_posix(): sha256_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    }
    seal(directory, manifest)


def seal(directory: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with a correct hash and seal."""
    identity = {name: manifest[name] for name in ("kind", "schema", "settings", "made_from", "files")}
    forged = {name: value for name, value in manifest.items() if name != SEAL} | {"hash": sha256_json(identity)}
    write_sealed(directory / MANIFEST, forged)


class Selected:
    """Ten users by hand whose training interactions are all selected: 33 samples in five shards."""

    PER_SHARD = 8

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        sequences = [rng.choice(30, 5 + user % 4, replace=False).tolist() for user in range(10)]
        self.dataset = by_hand(sequences, pa.array(range(30)), pa.array(range(10)))
        self.selection = Selection(*self.dataset.training_samples(), {})
        self.total = len(self.selection.user_rows)
        self.states_NLD = np.zeros((30, 2, 4), np.float16)

    def key(self, number: int) -> str:
        """The key of a sample."""
        return f"{self.selection.user_rows[number]:09d}-{self.selection.positions[number]:06d}"

    def make(self, places: range) -> Iterator[Sample]:
        """The samples at these places."""
        for place in places:
            user, position = int(self.selection.user_rows[place]), int(self.selection.positions[place])
            history, target = self.dataset.history(user, position), int(self.dataset.sequence(user)[position])
            states = np.full((2, 4), user + position / 8, np.float16)
            tokens, vectors = np.arange(9 + position, dtype=np.int32), {"id": np.full((1, 3), user, np.float32)}
            yield Sample(user, position, target, history, tokens, {"id": 1}, states, vectors)

    def write(self, directory: Path) -> dict[str, Any]:
        """Write the shards; return their manifest."""
        return self._write(directory, "by hand")

    def problems(self, directory: Path, deep: bool = False) -> dict[str, str]:
        """The lines of a verification, by file."""
        manifest = read_manifest(directory, "shards")
        found = writing.damaged_files(directory, manifest, 2)
        if found or not deep:
            return found
        samples = ShardDataset(open_index(directory, manifest), Tars(directory))
        return writing.wrong_samples(samples, self.dataset, self.selection, self.states_NLD)

    def repair(self, directory: Path) -> None:
        """Write the damaged files anew."""
        manifest = read_manifest(directory, "shards")
        writing.keep_intact_tars(directory, manifest, self.problems(directory, deep=True))
        self._write(directory, manifest["hash"])

    def _write(self, directory: Path, identity: str) -> dict[str, Any]:
        places = [range(self.total)[at : at + self.PER_SHARD] for at in range(0, self.total, self.PER_SHARD)]
        return finish(directory, writing.write_shards(directory, places, 2, self.make, identity))


Member = tuple[tarfile.TarInfo, bytes]
Change = Callable[[list[Member]], list[Member]]


def rewrite_tar(path: Path, change: Change) -> None:
    """Rewrite a tar with other members, and update index and manifest to match."""
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in change(members):
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    directory = path.parent
    tars = sorted(directory.glob("*.tar"))
    rows = [[(shard, *row) for row in _extents(tar)] for shard, tar in enumerate(tars)]
    np.save(directory / INDEX, np.array([row for own in rows for row in own], INDEX_ROW))
    records = [
        {"file": tar.name, "samples": len(own), "bytes": tar.stat().st_size, "sha256": sha256_file(tar)}
        for tar, own in zip(tars, rows, strict=True)
    ]
    sign(directory, shards=records, samples=sum(map(len, rows)))


def _extents(path: Path) -> Iterator[tuple[int, ...]]:
    """Index rows without the shard, read with `tarfile`."""
    data, starts, end = path.read_bytes(), list[tuple[int, tuple[str, ...]]](), 0
    with tarfile.open(path) as tar:
        for info in tar:
            key = re.match(r"(\d{9})-(\d{6})\.", info.name)
            if key and (not starts or starts[-1][1] != key.groups()):
                starts.append((info.offset, key.groups()))
            end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    for (start, key), stop in zip(starts, [*(start for start, _ in starts[1:]), end], strict=True):
        user, position = map(int, key)
        digest = int.from_bytes(hashlib.sha256(data[start:stop]).digest()[:8], "little")
        yield start, stop - start, 9 + position, user, position, digest
