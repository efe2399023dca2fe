"""Import vectors from files: read them, check them, and write them in the order of the prepared dataset's rows.

Shape letters: R rows of a file, N rows of the dataset (items or users), K vectors a row, E dimension.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from rarec.config.shipped import resolve_path
from rarec.errors import UserError

CHUNK = 1 << 16
"""Rows copied at a time."""
SHOWN = 5
"""Number of ids shown in a message."""
WIDTH = 40
"""Characters of an id shown in a message."""
_ID_REMEDY = "save the ids as integers or as text, as they are in the interaction log"


@dataclass(frozen=True)
class Vectors:
    """The vectors of a file.

    Attributes:
        path: from the configuration.
        rows: (R, E), or (R, K, E); memory-mapped where the format allows it.
        ids: original id of each row, (R,).
    """

    path: str
    rows: npt.NDArray[np.generic]
    ids: pa.Array

    def write_aligned(
        self, to: Path, wanted: pa.Array, of: str, remedy: str, *, gaps: bool = False
    ) -> tuple[int, npt.NDArray[np.int64]]:
        """Write the rows of the wanted ids, in that order, as float32 `.npy`, a chunk at a time.

        Args:
            to: the file to write.
            wanted: original ids, (N,); compared as text where the two types differ.
            of: `item` or `user`, for messages.
            remedy: of missing ids, for messages.
            gaps: allow missing ids, and give them zero vectors.

        Returns:
            The number of rows of the file that were not wanted, and the places of zero vectors among N.

        Raises:
            UserError: a wanted id has no row (with `gaps`: no wanted id has one), or its vector is not finite.
        """
        place_N = self._places(wanted, of, remedy, gaps)
        out = np.lib.format.open_memmap(to, mode="w+", dtype=np.float32, shape=(len(wanted), *self.rows.shape[1:]))
        zero = [np.empty(0, np.int64)]
        for start in range(0, len(wanted), CHUNK):
            part = place_N[start : start + CHUNK]
            with np.errstate(over="ignore"):
                block = self.rows[part].astype(np.float32)
            block[part < 0] = 0
            bad = np.flatnonzero(~np.isfinite(block.reshape(len(block), -1)).all(axis=1))
            if bad.size:
                row = int(part[bad[0]])
                raise UserError(
                    f"{self.path}: the vector of {of} {self.ids[row].as_py()!r} (row {row}) holds NaN or infinity",
                    "export the vectors again, in float32 range",
                )
            out[start : start + CHUNK] = block
            zero.append(start + np.flatnonzero(~block.reshape(len(block), -1).any(axis=1)))
        out.flush()
        return len(self.ids) - int((place_N >= 0).sum()), np.concatenate(zero)

    def _places(self, wanted: pa.Array, of: str, remedy: str, gaps: bool) -> npt.NDArray[np.int64]:
        """Return the file's row of each wanted id; -1 for a gap."""
        wanted, own = _comparable(wanted, self.ids)
        place_N = pc.index_in(wanted, value_set=own)
        if place_N.null_count == len(wanted):
            problem = f"{self.path}: none of its ids ({_shown(own)}) matches the dataset's {of} ids ({_shown(wanted)})"
            raise UserError(problem, f"use the {of} ids of the interaction log")
        if place_N.null_count and not gaps:
            missing = wanted.filter(place_N.is_null())
            raise UserError(
                f"{self.path}: no vector for {len(missing)} of {len(wanted)} {of}s (first: {_shown(missing)})", remedy
            )
        return np.asarray(pc.fill_null(place_N, -1).to_numpy(), dtype=np.int64)


def read_vectors(path: str, ids_path: str | None, field: str, ids_field: str) -> Vectors:
    """Read vectors and the id of each row.

    Args:
        path: `.npy`, `.safetensors` with one tensor, or `.parquet` with columns `id` and `vector`.
        ids_path: file with one id per row, in order; needed unless the vectors are Parquet, and only then.
        field: configuration field of `path`, for messages.
        ids_field: configuration field of `ids_path`, for messages.

    Raises:
        UserError: a file is missing, of another format or pickled, rows differ in length, or ids and rows do not match.
    """
    suffix = existing(path, field).suffix
    if suffix not in READERS:
        raise UserError(f"field `{field}`: {path} has an unknown format", f"use one of {', '.join(READERS)}")
    rows, ids = READERS[suffix](path)
    if ids is not None and ids_path is not None:
        raise UserError(f"field `{ids_field}`: {path} already has ids, in its column `id`", f"leave `{ids_field}` out")
    if ids is None:
        if ids_path is None:
            raise UserError(f"{path} has no ids", f"set `{ids_field}` to a file with one id per row")
        existing(ids_path, ids_field)
        ids = read_ids(ids_path)
    if rows.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {rows.dtype}, not numbers", "save the vectors as float32")
    if rows.ndim not in (2, 3) or 0 in rows.shape:
        remedy = "save vectors with two axes: rows, dimension (three for users: rows, vectors of a user, dimension)"
        raise UserError(f"{path} has shape {rows.shape}", remedy)
    if len(ids) != len(rows):
        raise UserError(
            f"{ids_path} has {len(ids)} ids, but {path} has {len(rows)} rows", "give one id per row, in order"
        )
    _raise_if_bad(ids, ids_path or path)
    return Vectors(path, rows, ids)


def read_ids(path: str) -> pa.Array:
    """Read one id per row: the first column of a Parquet file, a `.npy` file of one axis, or the lines of a text file.

    Raises:
        UserError: the file does not have the format of its suffix.
    """
    file = Path(resolve_path(path))
    if file.suffix == ".parquet":
        return _parquet(path).column(0).combine_chunks()
    if file.suffix == ".npy":
        array = _npy(path)
        if array.ndim != 1:
            raise UserError(f"{path} has shape {array.shape}", "save a list of ids with one axis")
        try:
            return pa.array(array.astype(array.dtype.newbyteorder("=")))  # Arrow needs native byte order
        except pa.ArrowException:
            raise UserError(f"{path} holds {array.dtype}, which are no ids", _ID_REMEDY) from None
    try:
        # split at \n only: an id may contain other characters that Python's splitlines would split at
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        return pa.array(lines if lines != [""] else [], type=pa.string())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}", "save it as UTF-8, one id per line") from None


def existing(path: str, field: str) -> Path:
    """Return the file that a field of the configuration names.

    Raises:
        UserError: the file does not exist, or may not be read.
    """
    file = Path(resolve_path(path))
    if not file.is_file():
        raise UserError(f"field `{field}`: {path} does not exist", "paths are relative to the current directory")
    if not os.access(file, os.R_OK):
        raise UserError(f"field `{field}`: {path} may not be read by this user", "change its permissions: chmod a+r")
    return file


def _npy(path: str) -> npt.NDArray[np.generic]:
    try:
        # not `np.load`, which also reads archives and pickles
        array: npt.NDArray[np.generic] = np.lib.format.open_memmap(resolve_path(path), mode="r")
    except Exception as error:  # a header is Python code, which NumPy parses: anything may be raised
        remedy = "save a plain array of numbers: np.save(file, np.asarray(values))"
        raise UserError(f"{path} is not a plain .npy array: {_first_line(error)}", remedy) from None
    return array


def _first_line(error: Exception) -> str:
    """Return the first line of a library's message; some go on with advice to switch its protection off."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _parquet(path: str) -> pa.Table:
    try:
        with pq.ParquetFile(resolve_path(path), page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{path} has two columns named {twice!r}", "give each column its own name")
            if not names:
                raise UserError(f"{path} has no columns", "save it again, with a column of ids")
            return file.read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not Parquet: {_first_line(error)}", "save it again as Parquet") from None


def _read_npy(path: str) -> tuple[npt.NDArray[np.generic], None]:
    return _npy(path), None


def _read_safetensors(path: str) -> tuple[npt.NDArray[np.generic], None]:
    try:
        with safe_open(resolve_path(path), "pt") as file:  # torch reads bfloat16, numpy does not
            names = list(file.keys())
            if len(names) != 1:
                shown = ", ".join(names[:SHOWN])
                raise UserError(f"{path} holds {len(names)} tensors ({shown})", "save one tensor, the vectors")
            tensor = file.get_tensor(names[0])
            if tensor.dtype == torch.bool or tensor.is_complex():
                raise UserError(f"{path} holds {tensor.dtype}, not numbers", "save the vectors as float32")
            return tensor.float().numpy(), None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not safetensors: {_first_line(error)}", "save it again as safetensors") from None


def _read_parquet(path: str) -> tuple[npt.NDArray[np.generic], pa.Array]:
    table = _parquet(path)
    if not {"id", "vector"} <= set(table.column_names):
        found = ", ".join(table.column_names)
        raise UserError(f"{path} has columns {found}", "save the columns `id` and `vector`")
    ids, vectors = (table[name].combine_chunks() for name in ("id", "vector"))
    if not (pa.types.is_list(vectors.type) or pa.types.is_large_list(vectors.type)):
        if not pa.types.is_fixed_size_list(vectors.type):
            raise UserError(f"{path}: column `vector` is {vectors.type}", "save it as a list of numbers")
        vectors = vectors.cast(pa.large_list(vectors.type.value_type))
    lengths = pc.fill_null(pc.list_value_length(vectors), 0).to_numpy()
    ragged = np.flatnonzero(lengths != lengths[0]) if len(lengths) else np.empty(0, dtype=np.int64)
    if ragged.size:
        row = int(ragged[0])
        problem = (
            f"the vector of id {ids[row].as_py()!r} (row {row}) has {lengths[row]} numbers, row 0 has {lengths[0]}"
        )
        raise UserError(f"{path}: {problem}", "save vectors of one dimension")
    flat = vectors.flatten().to_numpy(zero_copy_only=False)  # a null number becomes NaN, which is refused later
    return flat.reshape(len(ids), lengths[0] if len(lengths) else 0), ids


READERS: dict[str, Callable[[str], tuple[npt.NDArray[np.generic], pa.Array | None]]] = {
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
}
"""Readers of vectors, and of their ids if the format has them, by the file's suffix."""


def _comparable(one: pa.Array, other: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Convert both to integers if both are integers, else both to text."""
    if all(pa.types.is_integer(ids.type) for ids in (one, other)):
        with suppress(pa.ArrowInvalid):  # unsigned integers may be too large
            return one.cast(pa.int64()), other.cast(pa.int64())
    return one.cast(pa.string()), other.cast(pa.string())


def _raise_if_bad(ids: pa.Array, path: str) -> None:
    """Refuse ids that are neither whole numbers nor text, missing ones, and repeated ones."""
    kind = ids.type.value_type if pa.types.is_dictionary(ids.type) else ids.type
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_large_string)
    if not any(test(kind) for test in (*tests, pa.types.is_binary, pa.types.is_decimal, pa.types.is_null)):
        raise UserError(f"{path}: the ids are of type {kind}", _ID_REMEDY)
    if pa.types.is_floating(kind) and not all(float(value).is_integer() for value in ids.drop_null().to_pylist()):
        raise UserError(f"{path}: the ids are fractions, NaN or infinite ({_shown(ids)})", _ID_REMEDY)
    try:
        ids = pc.if_else(pc.equal(ids.cast(pa.string()), ""), None, ids)
    except pa.ArrowInvalid:
        raise UserError(f"{path}: an id is not UTF-8 text", _ID_REMEDY) from None
    if ids.null_count:
        row = int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{path}: row {row} has no id", "give every row an id")
    counts = pc.value_counts(ids)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise UserError(
            f"{path}: {len(repeated)} ids occur more than once (first: {_shown(repeated)})", "keep one row per id"
        )


def _shown(ids: pa.Array) -> str:
    return ", ".join(repr(value)[:WIDTH] for value in ids[:SHOWN].to_pylist())
