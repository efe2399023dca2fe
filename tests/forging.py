"""Small valid shards for tests, and tools to change them with or without updating the hashes."""

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rarec.data.shards.batch_plan import BatchPlan
from rarec.data.shards.checks import verify_shards
from rarec.data.shards.expected import Expected
from rarec.data.shards.index import ENTRY, INDEX, open_index
from rarec.data.shards.samples import Sample, SampleSpec
from rarec.data.shards.stream import SampleStream
from rarec.data.shards.tars import LocalTars
from rarec.data.shards.writing import finish_shards, repair_shards, write_shards
from rarec.storage.artefacts import MANIFEST, SEAL, read_manifest, sha256_json, write_sealed
from rarec.storage.files import read_json, sha256_file
from tests.datasets import by_hand

ITEMS, PER_SHARD = 30, 8
Member = tuple[tarfile.TarInfo, bytes]
Change = Callable[[list[Member]], list[Member]]


def expected_shards() -> Expected:
    """Return ten users whose training interactions are all selected: 32 samples."""
    rng = np.random.default_rng(0)
    sequences = [rng.choice(ITEMS, 5 + user % 4, replace=False).tolist() for user in range(10)]
    dataset = by_hand(sequences, pa.array(range(ITEMS)), pa.array(range(10)))
    spec = SampleSpec((2, 4), np.dtype(np.float16), {"id": (1, 3)}, frozenset({"id"}), vocabulary=20)
    return Expected(dataset, *dataset.training_samples(), PER_SHARD, spec)


EXPECTED = expected_shards()
TOTAL = len(EXPECTED.user_rows_S)


def make(places: range) -> Iterator[Sample]:
    """Yield the valid samples."""
    for place in places:
        user, position = int(EXPECTED.user_rows_S[place]), int(EXPECTED.positions_S[place])
        yield honest(user, position)


def honest(user: int, position: int) -> Sample:
    """Return the valid sample of any position of a user."""
    history, target = EXPECTED.dataset.history(user, position), int(EXPECTED.dataset.sequence(user)[position])
    states, vectors = np.full((2, 4), user + position / 8, np.float16), {"id": np.full((1, 3), user, np.float32)}
    return Sample(user, position, target, history, np.arange(9 + position, dtype=np.int32), {"id": 1}, states, vectors)


def write_honest(directory: Path) -> dict[str, Any]:
    """Write valid shards; return the manifest."""
    records = write_shards(directory, TOTAL, PER_SHARD, make, "honest")
    return finish_shards(directory, records, {}, {"prepare": "by hand"})


def problems(directory: Path, deep: bool = True) -> list[str]:
    """Return the lines that verification reports, one per file."""
    return [problem.line for problem in verify_shards(directory, read_manifest(directory, "shards"), EXPECTED, 2, deep)]


def repair(directory: Path) -> None:
    """Repair broken files."""
    manifest = read_manifest(directory, "shards")
    broken = {problem.file for problem in verify_shards(directory, manifest, EXPECTED, 2, deep=True)}
    records = repair_shards(directory, manifest, broken, TOTAL, PER_SHARD, make, lambda line: None)
    finish_shards(directory, records, manifest["settings"], manifest["made_from"])


def stream(directory: Path) -> list[Sample]:
    """Read an epoch as training does."""
    index_S = open_index(directory, read_manifest(directory, "shards"))
    plan = BatchPlan(index_S["shard"], index_S["tokens"], 0, batch_size=4)
    reader = SampleStream(plan, index_S, LocalTars(directory), ITEMS, EXPECTED.spec)
    return [sample for batch in reader.epoch(0) for sample in batch]


def bytes_of(directory: Path) -> dict[str, bytes]:
    """Return the content of all files, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def retar(path: Path, change: Change) -> None:
    """Rewrite a tar with other members."""
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in change(members):
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def in_field(key: str, field: str, change: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of one field of one sample."""
    return lambda members: [(i, change(data) if i.name == f"{key}.{field}" else data) for i, data in members]


def in_all(field: str, change: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of one field of every sample."""
    return lambda members: [(i, change(data) if i.name.endswith(f".{field}") else data) for i, data in members]


def member(name: str, data: bytes = b"", **info: Any) -> Member:
    """Create a tar member of any type."""
    result = tarfile.TarInfo(name)
    for field, value in info.items():
        setattr(result, field, value)
    return result, data


def members_of(sample: Sample, key: str | None = None) -> list[Member]:
    """Return the members of a sample, under its own key or another."""
    return [member(f"{key or sample.key}.{field}", data) for field, data in sorted(sample.fields().items())]


def forge(directory: Path) -> None:
    """Update index and manifest to match the tars."""
    records, rows = [], []
    for shard, path in enumerate(sorted(directory.glob("*.tar"))):
        found = [(shard, *row) for row in _extents(path)]
        rows += found
        lengths = {str(size): sum(-(-row[3] // 8) * 8 == size for row in found) for size in (8, 16, 24)}
        lengths = {size: count for size, count in lengths.items() if count}
        size = path.stat().st_size
        record = {"file": path.name, "samples": len(found), "bytes": size, "sha256": sha256_file(path)}
        records.append({**record, "lengths": lengths})
    np.save(directory / INDEX, np.array(rows, ENTRY))
    sign(directory, shards=records, samples=len(rows))


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


def _extents(path: Path) -> Iterator[tuple[int, ...]]:
    """Yield index rows without the shard, read with `tarfile`; unexpected members belong to the sample before them."""
    data, starts, end = path.read_bytes(), [], 0
    with tarfile.open(path) as tar:
        for info in tar:
            key = re.match(r"(\d{9})-(\d{6})\.", info.name)
            if key and (not starts or starts[-1][1] != key.groups()):
                starts.append((info.offset, key.groups()))
            end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE * info.isreg()
    for (start, key), stop in zip(starts, [*(start for start, _ in starts[1:]), end], strict=True):
        user, position = map(int, key)
        digest = int.from_bytes(hashlib.sha256(data[start:stop]).digest()[:8], "little")
        yield start, stop - start, 9 + position, user, position, digest
