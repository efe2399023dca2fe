"""Training samples, their tars (WebDataset: JSON and `.npy`, no pickle), and their rows in the index.

Shape letters: S samples, T tokens, H history, L stored blocks, D hidden size, K vectors of a source, E their width.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset

from rarec.errors import UserError
from rarec.storage.files import atomic_write, sha256_file

_PLACE = [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4")]
_CONTENT = [("tokens", "<u4"), ("user", "<u4"), ("position", "<u4"), ("digest", "<u8")]
INDEX_ROW = np.dtype(_PLACE + _CONTENT)
"""`offset` and `size`: the sample's members in its tar, from the first header to the end of the last padding. `tokens`:
number of text tokens of the user prompt. `digest`: hash of those bytes, see `digest_of`.
"""
REPAIR = "repair the damaged files: rarec shards CONFIG --verify --repair"
LENGTHS = 8
"""Bin width of a shard's histogram of prompt lengths."""
_VECTOR = "vector-"
_NPY_HEADER = 10
"""Offset of the header in a `.npy` file; the two bytes before are its length."""

IndexRows = npt.NDArray[np.void]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """One training interaction: a user's history up to a position, and the item that follows.

    Attributes:
        user: user row.
        position: position of the target in the user's sequence.
        target: item row.
        history_H: all item rows before the target, oldest first: the loss masks them as negatives.
        tokens_T: text tokens of the user prompt.
        marks: for each source, the position of its slots among the tokens; of slots at titles, a list.
        states_LD: pooled text-only states of the user prompt.
        vectors: for each source, the user's frozen vectors (K, E) after this history.
    """

    user: int
    position: int
    target: int
    history_H: npt.NDArray[np.int32]
    tokens_T: npt.NDArray[np.int32]
    marks: dict[str, int | list[int]]
    states_LD: npt.NDArray[np.floating[Any]]
    vectors: dict[str, npt.NDArray[np.float32]]

    @property
    def key(self) -> str:
        """The name of the sample in its shard and in messages."""
        return sample_key(self.user, self.position)

    def fields(self) -> dict[str, bytes]:
        """Return the sample as files of a tar, by field."""
        facts = {"user": self.user, "position": self.position, "target": self.target, "marks": self.marks}
        arrays: dict[str, Array] = {"history": self.history_H, "tokens": self.tokens_T, "states": self.states_LD}
        arrays |= {_VECTOR + name: vectors for name, vectors in self.vectors.items()}
        packed = {f"{name}.npy": _pack(array) for name, array in arrays.items()}
        return {"json": json.dumps(facts, sort_keys=True).encode(), **packed}

    @classmethod
    def parse(cls, extent: bytes | memoryview) -> "Sample":
        """Parse a sample from its members in a tar; its arrays are views of the bytes.

        Raises:
            Exception: a field is missing, or not what its name says.
        """
        fields = {name.partition(".")[2]: data for _, name, data in _members(memoryview(extent))}
        facts = json.loads(bytes(fields.pop("json")))
        arrays = {field.removesuffix(".npy"): _unpack(data) for field, data in fields.items()}
        own = {name: arrays.pop(name) for name in ("history", "tokens", "states")}
        vectors = {name.removeprefix(_VECTOR): array for name, array in arrays.items()}
        rows = facts["user"], facts["position"], facts["target"]
        return cls(*rows, own["history"], own["tokens"], facts["marks"], own["states"], vectors)


def fold_of(user_rows: Any, folds: int) -> Any:
    """Return the part of a user, or of each in an array: the users are cut into parts that take turns (`ids.folds`)."""
    return user_rows % folds


def sample_key(user: int, position: int) -> str:
    """Return the name of a sample in its shard and in messages."""
    return f"{user:09d}-{position:06d}"


def key_of(row: np.void) -> str:
    """Return the key of the sample of an index row."""
    return sample_key(int(row["user"]), int(row["position"]))


def digest_of(extent: bytes | memoryview) -> int:
    """Return the first 8 bytes of the sha256 as a little-endian integer."""
    return int.from_bytes(hashlib.sha256(extent).digest()[:8], "little")


def write_tar(path: Path, samples: Iterable[Sample], shard: int) -> tuple[dict[str, Any], IndexRows]:
    """Write one tar to a temporary file, fsync it and rename it. Its bytes depend on the samples alone.

    Args:
        path: path of the tar.
        samples: samples in order.
        shard: number of the tar, for the index.

    Returns:
        The record for the manifest (file, samples, bytes, sha256, lengths), and the (S,) rows of the index.
    """
    owner = {"user": "rarec", "group": "rarec", "mtime": 0}
    with atomic_write(path) as file, webdataset.TarWriter(file, encoder=False, **owner) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, **sample.fields()})
    rows_S = index_tar(path, shard)
    bounds_S = -(-rows_S["tokens"].astype(np.int64) // LENGTHS) * LENGTHS
    lengths = {str(bound): int(count) for bound, count in zip(*np.unique(bounds_S, return_counts=True), strict=True)}
    record = {"file": path.name, "samples": len(rows_S), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return {**record, "lengths": lengths}, rows_S


def index_tar(path: Path, shard: int) -> IndexRows:
    """Return the (S,) index rows of an intact tar, from the tar alone."""
    tar = np.memmap(path, np.uint8, "r").data
    rows = []
    offsets = dict[str, int]()
    end = 0
    for offset, name, data in _members(tar):
        offsets.setdefault(name.partition(".")[0], offset)
        end = offset + tarfile.BLOCKSIZE + _padded(len(data))
    for offset, stop in pairwise([*offsets.values(), end]):
        extent = tar[offset:stop]
        sample = Sample.parse(extent)
        key = sample.user, sample.position
        rows.append((shard, offset, len(extent), len(sample.tokens_T), *key, digest_of(extent)))
    return np.array(rows, INDEX_ROW)


def read_sample(extent: bytes | memoryview, row: np.void, shard: str) -> Sample:
    """Parse the sample of an index row; its arrays are views of the bytes.

    Args:
        extent: bytes of the tar at the row's offset.
        row: row of the index.
        shard: name of the tar, for messages.

    Raises:
        UserError: the bytes differ from what was indexed, or are not a sample.
    """
    name = f"shard {shard}, sample {key_of(row)}"
    if digest_of(extent) != row["digest"]:
        raise UserError(f"{name}: its bytes differ from what was written", REPAIR)
    try:
        return Sample.parse(extent)
    except Exception as error:  # NumPy's parser alone raises many kinds
        raise UserError(f"{name} is not a sample: {type(error).__name__}: {error}", REPAIR) from None


def _members(tar: memoryview) -> Iterator[tuple[int, str, memoryview]]:
    """Yield the offset, the name and the content of each member of a tar; 20 times faster than `tarfile`.

    The headers are those that were written, because a hash was compared before: the name is in bytes 0 to 99, the size
    in octal digits in bytes 124 to 134.
    """
    offset = 0
    while offset < len(tar) and tar[offset]:  # zeros mark the end
        header = bytes(tar[offset : offset + tarfile.BLOCKSIZE])
        start, size = offset + tarfile.BLOCKSIZE, int(header[124:135], 8)
        yield offset, header[:100].rstrip(b"\0").decode(), tar[start : start + size]
        offset = start + _padded(size)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _pack(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _unpack(data: memoryview) -> Array:
    """Return the array of a `.npy` file as a view, read-only if the bytes are; headers are parsed once."""
    start = _NPY_HEADER + int.from_bytes(data[_NPY_HEADER - 2 : _NPY_HEADER], "little")
    dtype, shape = _npy_header(bytes(data[_NPY_HEADER - 2 : start]))
    return np.frombuffer(data, dtype, offset=start).reshape(shape)  # refuses objects


@lru_cache(maxsize=1024)
def _npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    shape, _, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    return dtype, shape
