"""The index of the shards, `samples.npy`: one row a sample, in the order of the tars, opened memory-mapped.

With it a reader takes exactly the bytes of the samples it needs, checks each, and names the damaged ones.

Shape letters: S samples.
"""

import hashlib
import mmap
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.artefacts import MANIFEST
from rarec.errors import UserError
from rarec.files import write_aside

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
of the user prompt's text. `digest`: of that extent, see `digest_of`."""
REPAIR = "make what is broken again: rarec shards CONFIG --verify --repair"
REBUILD = "make them again: rarec shards CONFIG --fresh"

_NO_ARRAY = (OSError, EOFError, ValueError, TypeError, ArithmeticError, MemoryError, SyntaxError, RecursionError)
"""What NumPy raises at headers that are none, beside `tokenize.TokenError`."""

Entries = npt.NDArray[np.void]


def sample_key(user: int, position: int) -> str:
    """Names a sample in its shard and in messages."""
    return f"{user:09d}-{position:06d}"


def key_of(entry: np.void) -> str:
    """The key of an index row's sample."""
    return sample_key(int(entry["user"]), int(entry["position"]))


def digest_of(extent: bytes | memoryview) -> int:
    """The first 8 bytes of the sha256, little endian."""
    return int.from_bytes(hashlib.sha256(extent).digest()[:8], "little")


def tar_name(shard: int) -> str:
    """The file of a shard."""
    return f"{shard:06d}.tar"


def is_tar_name(name: str) -> bool:
    """Whether a shard may bear it."""
    return re.fullmatch(r"\d{6,}\.tar", name) is not None


def write_index(directory: Path, parts: Iterable[Entries], samples: int) -> None:
    """Write the index from its shards' rows, one shard after the other: it need not fit in memory."""
    with write_aside(directory / INDEX) as file:
        header = {"descr": np.lib.format.dtype_to_descr(ENTRY), "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        for rows_S in parts:
            file.write(rows_S.tobytes())


def open_index(directory: Path, manifest: Mapping[str, Any]) -> Entries:
    """Map the index of shards that this manifest describes; (S,) of `ENTRY`.

    Raises:
        UserError: the manifest's records are garbled, or the index is missing, no index, or not of these shards.
    """
    records, path = shard_records(directory, manifest), directory / INDEX
    index_S: Entries = map_npy(path)
    if index_S.dtype != ENTRY or index_S.shape != (manifest["samples"],):
        found = f"{index_S.dtype.name} of shape {index_S.shape}"
        raise UserError(f"{path} is no index of {manifest['samples']} samples, but {found}", REPAIR)
    start = 0
    for shard, record in enumerate(records):  # one by one: memory does not grow with the index
        wrong = np.flatnonzero(index_S["shard"][start : start + record["samples"]] != shard)
        if len(wrong):
            row = start + int(wrong[0])
            problem = f"{path}, row {row}: sample {key_of(index_S[row])} is not in shard {record['file']}"
            raise UserError(f"{problem}, which the manifest puts there", REPAIR)
        start += record["samples"]
        release_pages(index_S)
    return index_S


def map_npy(path: Path) -> npt.NDArray[Any]:
    """Map an array of numbers; nothing in the file is run.

    Raises:
        UserError: the file is missing, or something else.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing", REPAIR)
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (*_NO_ARRAY, tokenize.TokenError) as error:
        raise UserError(f"{path} cannot be read: {error}", REPAIR) from None
    return array


def split_by_shard(index_S: Entries, records: Sequence[Mapping[str, Any]]) -> list[Entries]:
    """Views of the index, one a shard."""
    return np.split(index_S, np.cumsum([record["samples"] for record in records])[:-1])


def shard_records(directory: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The manifest's record of each shard, whole and in agreement with the rest of the manifest.

    Raises:
        UserError: they are not.
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
        raise UserError(f"{path}: `samples` is {manifest.get('samples')}, its shards hold {total}", REBUILD)
    beyond = sorted(name for name in files if name.endswith(".tar") and name not in {r["file"] for r in records})
    if beyond:
        raise UserError(f"{path}: {beyond[0]} is among `files`, but not among `shards`", REBUILD)
    return records


def _record_problem(record: Any, name: str, files: Mapping[str, str]) -> str | None:
    """What is wrong with a shard's record, if anything."""
    if not isinstance(record, dict) or set(record) != {"file", "samples", "bytes", "sha256", "lengths"}:
        return "its record has other fields than file, samples, bytes, sha256, lengths"
    if record["file"] != name:
        return f"its record names the file {record['file']!r}"
    if name not in files or record["sha256"] != files[name]:
        return "its record and `files` differ in its sha256"
    counts = record["lengths"].values() if isinstance(record["lengths"], dict) else [None]
    if not all(type(count) is int and count >= 0 for count in (record["samples"], record["bytes"], *counts)):
        return "its record counts samples, bytes or lengths by something that is no count"
    if not record["samples"] or sum(counts) != record["samples"]:
        return f"its record says {record['samples']} samples, and {sum(counts)} lengths"
    return None


def release_pages(array: object) -> None:
    """Let go of the pages of a mapped array that were looked at; an array in memory stays as it is.

    They count as this process's memory, though the operating system holds them anyway, and gives them back at once.
    """
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap):
        array.madvise(mmap.MADV_DONTNEED)
