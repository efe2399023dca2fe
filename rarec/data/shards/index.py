"""The index of the shards, `samples.npy`: one row per sample in the order of the tars, opened memory-mapped.

With it a reader fetches exactly the bytes of the samples it needs, verifies each, and can name damaged ones.

Shape letters: S samples.
"""

import hashlib
import mmap
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.data.columns import map_npy
from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST
from rarec.storage.files import atomic_write

INDEX = "samples.npy"
ENTRY = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("tokens", "<u4"),
        ("user", "<u4"),
        ("position", "<u4"),
        ("digest", "<u8"),
    ]
)
"""`offset` and `size`: the sample's members in its tar, from the first header to the end of the last padding. `tokens`:
number of text tokens of the user prompt. `digest`: hash of those bytes, see `digest_of`.
"""
REPAIR = "repair the damaged files: rarec shards CONFIG --verify --repair"
REBUILD = "rebuild the shards: rarec shards CONFIG --fresh"

Entries = npt.NDArray[np.void]


def sample_key(user: int, position: int) -> str:
    """Return the name of a sample in its shard and in messages."""
    return f"{user:09d}-{position:06d}"


def key_of(entry: np.void) -> str:
    """Return the key of the sample of an index row."""
    return sample_key(int(entry["user"]), int(entry["position"]))


def digest_of(extent: bytes | memoryview) -> int:
    """Return the first 8 bytes of the sha256 as a little-endian integer."""
    return int.from_bytes(hashlib.sha256(extent).digest()[:8], "little")


def tar_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"{shard:06d}.tar"


def is_tar_name(name: str) -> bool:
    """Return True if a file name is a valid shard name."""
    return re.fullmatch(r"\d{6,}\.tar", name) is not None


def write_index(directory: Path, parts: Iterable[Entries], samples: int) -> None:
    """Write the index shard by shard, so that it need not fit in memory.

    Args:
        directory: directory of the shards.
        parts: index rows of each shard, in order.
        samples: total number of rows.
    """
    with atomic_write(directory / INDEX) as file:
        header = {"descr": np.lib.format.dtype_to_descr(ENTRY), "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        for rows_S in parts:
            file.write(rows_S.tobytes())


def open_index(directory: Path, manifest: Mapping[str, Any]) -> Entries:
    """Map the index of the shards that a manifest describes.

    Returns:
        (S,) rows of type `ENTRY`.

    Raises:
        UserError: the manifest's records are malformed, or the index is missing, malformed, or of other shards.
    """
    records, path = shard_records(directory, manifest), directory / INDEX
    index_S: Entries = map_npy(path, REPAIR)
    if index_S.dtype != ENTRY or index_S.shape != (manifest["samples"],):
        found = f"{index_S.dtype.name} of shape {index_S.shape}"
        raise UserError(f"{path} is not an index of {manifest['samples']} samples but {found}", REPAIR)
    start = 0
    for shard, record in enumerate(records):  # shard by shard, so that memory does not grow with the index
        wrong = np.flatnonzero(index_S["shard"][start : start + record["samples"]] != shard)
        if len(wrong):
            row = start + int(wrong[0])
            problem = f"{path}, row {row}: sample {key_of(index_S[row])} is not in shard {record['file']}"
            raise UserError(f"{problem}, where the manifest expects it", REPAIR)
        start += record["samples"]
        release_pages(index_S)
    return index_S


def split_by_shard(index_S: Entries, records: Sequence[Mapping[str, Any]]) -> list[Entries]:
    """Split the index into views, one per shard."""
    return np.split(index_S, np.cumsum([record["samples"] for record in records])[:-1])


def shard_records(directory: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the manifest's record of each shard after checking them against the rest of the manifest.

    Raises:
        UserError: the records are malformed or contradict the manifest.
    """
    path, records, files = directory / MANIFEST, manifest.get("shards"), manifest["files"]
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: `shards` is not a list of shards", REBUILD)
    for shard, record in enumerate(records):
        problem = _record_problem(record, tar_name(shard), files)
        if problem:
            raise UserError(f"{path}, shard {tar_name(shard)}: {problem}", REBUILD)
    total = sum(record["samples"] for record in records)
    if manifest.get("samples") != total:
        raise UserError(f"{path}: `samples` is {manifest.get('samples')}, but its shards have {total}", REBUILD)
    beyond = sorted(name for name in files if name.endswith(".tar") and name not in {r["file"] for r in records})
    if beyond:
        raise UserError(f"{path}: {beyond[0]} is listed in `files` but not in `shards`", REBUILD)
    return records


def _record_problem(record: Any, name: str, files: Mapping[str, str]) -> str | None:
    """Return what is wrong with a shard's record, or None."""
    if not isinstance(record, dict) or set(record) != {"file", "samples", "bytes", "sha256", "lengths"}:
        return "its record does not have the fields file, samples, bytes, sha256, lengths"
    if record["file"] != name:
        return f"its record names the file {record['file']!r}"
    if name not in files or record["sha256"] != files[name]:
        return "its record and `files` differ in its sha256"
    counts = record["lengths"].values() if isinstance(record["lengths"], dict) else [None]
    if not all(type(count) is int and count >= 0 for count in (record["samples"], record["bytes"], *counts)):
        return "its record has a count of samples, bytes or lengths that is not a non-negative integer"
    if not record["samples"] or sum(counts) != record["samples"]:
        return f"its record has {record['samples']} samples but {sum(counts)} lengths"
    return None


def release_pages(array: object) -> None:
    """Release the resident pages of a memory-mapped array; other arrays are left alone.

    The pages count as memory of this process although they are only a cache of the file, and are reloaded on access.
    """
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap):
        array.madvise(mmap.MADV_DONTNEED)
