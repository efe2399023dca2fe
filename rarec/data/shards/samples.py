"""Training samples, their specification, and their storage in WebDataset tars (JSON and `.npy`, no pickle).

Shape letters: S samples, T tokens, H history, L stored blocks, D hidden size, K vectors of a source, E their width.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset

from rarec.data.shards.index import ENTRY, REPAIR, Entries, digest_of, key_of, sample_key
from rarec.data.shards.tar_members import parse_npy, split_members
from rarec.errors import UserError
from rarec.storage.files import atomic_write

LENGTHS = 8
"""Bin width of a shard's histogram of prompt lengths."""
_VECTOR = "vector-"
_FACTS = {"user", "position", "target", "marks"}
_ROWS, _HALF, _FLOAT = np.dtype(np.int32), np.dtype(np.float16), np.dtype(np.float32)
_KINDS = {"history": ((_ROWS,), 1), "tokens": ((_ROWS,), 1), "states": ((_HALF, _FLOAT), 2)}
"""Types and rank of each array."""
_VECTORS = ((_FLOAT,), 2)


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
        arrays = {"history": self.history_H, "tokens": self.tokens_T, "states": self.states_LD}
        arrays |= {_VECTOR + name: vectors for name, vectors in self.vectors.items()}
        return {"json": json.dumps(facts, sort_keys=True).encode(), **{f"{n}.npy": _pack(a) for n, a in arrays.items()}}

    @classmethod
    def parse(cls, key: str, fields: Mapping[str, memoryview]) -> "Sample":
        """Parse a sample from its files; its arrays are views of them.

        Args:
            key: expected key of the sample.
            fields: content of each file.

        Raises:
            ValueError: a field is missing, unknown, or malformed.
        """
        arrays = {field.removesuffix(".npy"): _array(field, data) for field, data in fields.items() if field != "json"}
        missing = [name for name in ("json", *(f"{name}.npy" for name in _KINDS)) if name not in fields]
        if missing:
            raise ValueError(f"it has no field {missing[0]}")
        facts = _facts(fields["json"], len(arrays["tokens"]))
        single = [name for name, mark in facts["marks"].items() if not isinstance(mark, list)]
        slotless = [name for name in single if _VECTOR + name not in arrays]
        if slotless:
            raise ValueError(f"it has no field {_VECTOR}{slotless[0]}.npy")
        vectors = {name.removeprefix(_VECTOR): a for name, a in arrays.items() if name.startswith(_VECTOR)}
        rows = facts["user"], facts["position"], facts["target"]
        sample = cls(*rows, arrays["history"], arrays["tokens"], facts["marks"], arrays["states"], vectors)
        if sample.key != key:
            raise ValueError(f"field json has the key {sample.key}")
        return sample


@dataclass(frozen=True)
class SampleSpec:
    """Types, shapes and names that all samples of some shards share.

    Attributes:
        states: (L, D) shape of the text-only states; (L,) if the width is unknown.
        state_dtype: type of the states.
        vectors: (K, E) shape of each source's vectors.
        marks: sources with slots in the user prompt.
        vocabulary: vocabulary size of the language model; None if it is not loaded.
    """

    states: tuple[int, ...]
    state_dtype: np.dtype[Any]
    vectors: Mapping[str, tuple[int, int]]
    marks: frozenset[str]
    vocabulary: int | None = None

    def mismatch(self, sample: Sample) -> str | None:
        """Return the first difference between a sample and the specification, or None."""
        states_LD, shapes = sample.states_LD, {name: array.shape for name, array in sample.vectors.items()}
        if states_LD.dtype != self.state_dtype or states_LD.shape[: len(self.states)] != self.states:
            return (
                f"field states.npy is {states_LD.dtype} of {states_LD.shape}, not {self.state_dtype} of {self.states}"
            )
        if shapes != self.vectors:
            return f"it has vectors of shape {shapes}, not {self.vectors}"
        if sample.marks.keys() != self.marks:
            return f"field json has slots of {sorted(sample.marks)}, not of {sorted(self.marks)}"
        return self._token_mismatch(sample.tokens_T)

    def _token_mismatch(self, tokens_T: npt.NDArray[np.int32]) -> str | None:
        if tokens_T.min(initial=0) < 0 or (self.vocabulary and tokens_T.max(initial=0) >= self.vocabulary):
            return f"field tokens.npy has a token outside the vocabulary of {self.vocabulary or 'any size'}"
        return None


def write_shard(path: Path, samples: Iterable[Sample], shard: int) -> tuple[dict[str, Any], Entries]:
    """Write one tar to a temporary file, fsync it and rename it. Its bytes depend on the samples alone.

    Args:
        path: path of the tar.
        samples: samples in order.
        shard: number of the tar, for the index.

    Returns:
        The record for the manifest (file, samples, bytes, sha256, lengths), and the (S,) rows of the index.
    """
    entries = []
    with atomic_write(path) as file:
        with webdataset.TarWriter(file, encoder=False, user="rarec", group="rarec", mtime=0) as tar:
            for sample in samples:
                offset = tar.tarstream.offset
                tar.write({"__key__": sample.key, **sample.fields()})
                size = tar.tarstream.offset - offset
                entries.append((shard, offset, size, len(sample.tokens_T), sample.user, sample.position, 0))
        file.flush()
        rows_S = np.array(entries, ENTRY)
        digest = _digest(Path(file.name), rows_S)
    return shard_record(path.name, rows_S, path.stat().st_size, digest), rows_S


def shard_record(file: str, rows_S: Entries, size: int, digest: str) -> dict[str, Any]:
    """Return the manifest's record of a tar; `lengths` counts prompts by the upper bound of their bin."""
    bounds_S = -(-rows_S["tokens"].astype(np.int64) // LENGTHS) * LENGTHS
    lengths = {str(bound): count for bound, count in sorted(Counter(bounds_S.tolist()).items())}
    return {"file": file, "samples": len(rows_S), "bytes": size, "sha256": digest, "lengths": lengths}


def read_sample(extent: bytes | memoryview, entry: np.void, shard: str) -> Sample:
    """Parse the sample of an index row; its arrays are views of the bytes.

    Args:
        extent: bytes of the tar at the row's offset.
        entry: row of the index.
        shard: name of the tar, for messages.

    Raises:
        UserError: the bytes differ from what was indexed, or are not a sample.
    """
    key = key_of(entry)
    try:
        if len(extent) != entry["size"] or digest_of(extent) != entry["digest"]:
            raise ValueError("its bytes differ from what was written")
        sample = Sample.parse(key, split_members(extent, key))
        if len(sample.tokens_T) != entry["tokens"]:
            raise ValueError(f"it has {len(sample.tokens_T)} tokens, but the index has {entry['tokens']}")
    except ValueError as error:
        raise UserError(f"shard {shard}, sample {key}: {error}", REPAIR) from None
    return sample


def _digest(path: Path, rows_S: Entries) -> str:
    """Return the sha256 of a tar, and fill in the digests of its samples."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        for row in rows_S:
            extent = file.read(int(row["size"]))
            row["digest"] = digest_of(extent)
            whole.update(extent)
        whole.update(file.read())
    return whole.hexdigest()


def _pack(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _array(field: str, data: memoryview) -> npt.NDArray[Any]:
    name = field.removesuffix(".npy")
    kind = _VECTORS if name.startswith(_VECTOR) else _KINDS.get(name)
    if kind is None or name == field:
        raise ValueError(f"it has an unknown field {field!r}")
    try:
        array = parse_npy(data)
    except ValueError as error:
        raise ValueError(f"field {field} {error}") from None
    types, rank = kind
    if array.dtype not in types or array.ndim != rank:
        wanted = f"{' or '.join(map(str, types))} of rank {rank}"
        raise ValueError(f"field {field} is {array.dtype} of rank {array.ndim}, not {wanted}")
    return array


def _is_mark(mark: Any, tokens: int) -> bool:
    """Return whether this is a position among the tokens, or a list of them."""
    if isinstance(mark, list):
        return all(type(each) is int and 0 <= each <= tokens for each in mark)
    return type(mark) is int and 0 <= mark <= tokens


def _facts(data: memoryview, tokens: int) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"field json is not JSON: {error}") from None
    if not isinstance(facts, dict) or facts.keys() != _FACTS:
        raise ValueError(f"field json is not an object of {', '.join(sorted(_FACTS))}")
    marks = facts["marks"]
    if not isinstance(marks, dict) or not all(_is_mark(mark, tokens) for mark in marks.values()):
        raise ValueError("field json: `marks` are not positions among the tokens")
    if not all(type(facts[name]) is int and facts[name] >= 0 for name in ("user", "position", "target")):
        raise ValueError("field json: user, position or target is not a non-negative integer")
    return facts
