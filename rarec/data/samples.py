"""Training samples in WebDataset tars: one sample, its fields, one shard (plain JSON and `.npy`, never pickle).

Shape letters: T tokens, H history, L stored blocks, D hidden size, K vectors of a source, E source dimension.
"""

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from rarec.artefacts import sha256_file, write_aside
from rarec.errors import UserError

_VECTOR = "vector-"
_REMAKE = "make them again: rarec shards CONFIG --fresh"


@dataclass(frozen=True)
class Sample:
    """One training interaction: a user's history up to a position, and the item that follows.

    Attributes:
        user: user row.
        position: of the target in the user's sequence.
        target: item row.
        history_H: item rows before the target, oldest first, all of them: the loss masks them as negatives.
        tokens_T: the user prompt's text tokens.
        marks: for each source, where its slots go among the tokens.
        states_LD: pooled text-only states of the user prompt.
        vectors: for each source, the user's frozen vectors (K, E) after this history.
    """

    user: int
    position: int
    target: int
    history_H: npt.NDArray[np.int32]
    tokens_T: npt.NDArray[np.int32]
    marks: dict[str, int]
    states_LD: npt.NDArray[np.floating[Any]]
    vectors: dict[str, npt.NDArray[np.float32]]

    @property
    def key(self) -> str:
        """Names the sample in its shard and in messages."""
        return f"{self.user:09d}-{self.position:06d}"

    def fields(self) -> dict[str, bytes]:
        """The sample as files of a tar."""
        facts = {"user": self.user, "position": self.position, "target": self.target, "marks": self.marks}
        arrays = {"history": self.history_H, "tokens": self.tokens_T, "states": self.states_LD}
        arrays |= {_VECTOR + name: vectors for name, vectors in self.vectors.items()}
        return {"json": json.dumps(facts, sort_keys=True).encode(), **{f"{n}.npy": _pack(a) for n, a in arrays.items()}}

    @classmethod
    def parse(cls, fields: dict[str, bytes]) -> "Sample":
        """The sample back from its files."""
        facts = json.loads(fields["json"])
        arrays = {name.removesuffix(".npy"): _unpack(data) for name, data in fields.items() if name.endswith(".npy")}
        vectors = {name.removeprefix(_VECTOR): a for name, a in arrays.items() if name.startswith(_VECTOR)}
        return cls(
            user=facts["user"],
            position=facts["position"],
            target=facts["target"],
            history_H=arrays["history"],
            tokens_T=arrays["tokens"],
            marks=facts["marks"],
            states_LD=arrays["states"],
            vectors=vectors,
        )


def write_shard(path: Path, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write one tar aside, fsync and rename it; returns its record for the manifest.

    The bytes depend on the samples alone. The record holds file, samples, bytes, sha256 and the prompts' lengths.
    """
    lengths: list[int] = []
    with (
        write_aside(path) as file,
        webdataset.TarWriter(file, encoder=False, user="rarec", group="rarec", mtime=0) as tar,
    ):
        for sample in samples:
            tar.write({"__key__": sample.key, **sample.fields()})
            lengths.append(len(sample.tokens_T))
    digest = sha256_file(path)
    size = path.stat().st_size
    return {"file": path.name, "samples": len(lengths), "bytes": size, "sha256": digest, "lengths": lengths}


def read_shard(path: Path, record: dict[str, Any]) -> list[Sample]:
    """Read one tar whole, checking it against its record: a tar cut at a record boundary reads without an exception.

    Raises:
        UserError: the shard is missing, altered, torn, or lacks a sample or a field.
    """
    if not path.is_file():
        raise UserError(f"shard {path} is missing", _REMAKE)
    if sha256_file(path) != record["sha256"]:
        raise UserError(f"shard {path} is not what its manifest says (sha256 differs)", _REMAKE)
    samples = []
    try:
        with path.open("rb") as file:  # opened here: to WebDataset, braces and colons in a path are a pattern
            for fields in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                samples.append(Sample.parse(fields))
    except (KeyError, ValueError, tarfile.TarError) as error:
        raise UserError(f"shard {path}, sample {len(samples)}: {type(error).__name__} {error}", _REMAKE) from None
    if len(samples) != record["samples"]:
        raise UserError(f"shard {path} holds {len(samples)} samples, its manifest says {record['samples']}", _REMAKE)
    return samples


def _pack(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _unpack(data: bytes) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array
