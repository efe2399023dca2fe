"""Import vectors from files: read them, check them, and write them in the order of the prepared dataset's rows.

Shape letters: R rows of a file, N rows of the dataset (items or users), K vectors a row, E dimension.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from rarec.config.shipped import resolve_path
from rarec.errors import UserError

FORMATS = (".npy", ".safetensors", ".parquet")
CHUNK = 1 << 16
"""Rows copied at a time."""
SHOWN = 5
"""Number of ids shown in a message."""
WIDTH = 40
"""Characters of an id shown in a message."""
_TABLE = "Parquet with columns `id` and `vector`, lists of one length"
_ID_TYPES = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_null)


@dataclass(frozen=True)
class Vectors:
    """The vectors of a file.

    Attributes:
        where: the field of the configuration and the path, for messages.
        rows: (R, E), or (R, K, E); memory-mapped where the format allows it.
        ids: original id of each row, (R,).
    """

    where: str
    rows: npt.NDArray[np.generic]
    ids: pa.Array

    def write_aligned(
        self, to: Path, wanted: pa.Array, kind: str, remedy: str, *, gaps: bool = False
    ) -> tuple[int, npt.NDArray[np.int64]]:
        """Write the rows of the wanted ids, in that order, as float32 `.npy`, a chunk at a time.

        Args:
            to: the file to write.
            wanted: original ids, (N,); compared as text where the two types differ.
            kind: `item` or `user`, for messages.
            remedy: of missing ids, for messages.
            gaps: allow missing ids, and give them zero vectors.

        Returns:
            The number of rows of the file that were not wanted, and the places of zero vectors among N.

        Raises:
            UserError: a wanted id has no row (with `gaps`: no wanted id has one), or its vector is not finite.
        """
        row_N = self._rows_of(wanted, kind, remedy, gaps)
        written = np.lib.format.open_memmap(to, mode="w+", dtype=np.float32, shape=(len(wanted), *self.rows.shape[1:]))
        zero = [np.empty(0, np.int64)]
        for start in range(0, len(wanted), CHUNK):
            row_C = row_N[start : start + CHUNK]
            with np.errstate(over="ignore"):
                chunk = self.rows[row_C].astype(np.float32)
            chunk[row_C < 0] = 0
            flat = chunk.reshape(len(chunk), -1)
            for place in np.flatnonzero(~np.isfinite(flat).all(axis=1)):
                row = int(row_C[place])
                problem = f"the vector of {kind} {self.ids[row].as_py()!r} (row {row}) holds NaN or infinity"
                raise UserError(f"{self.where}: {problem}", "export the vectors again, in float32 range")
            written[start : start + CHUNK] = chunk
            zero.append(start + np.flatnonzero(~flat.any(axis=1)))
        written.flush()
        return len(self.ids) - int((row_N >= 0).sum()), np.concatenate(zero)

    def _rows_of(self, wanted: pa.Array, kind: str, remedy: str, gaps: bool) -> npt.NDArray[np.int64]:
        """Return the file's row of each wanted id; -1 for a gap."""
        wanted, own = _comparable(wanted, self.ids)
        row_N = pc.index_in(wanted, value_set=own)
        if row_N.null_count == len(wanted):
            problem = f"none of its ids ({_shown(own)}) matches the dataset's {kind} ids ({_shown(wanted)})"
            raise UserError(f"{self.where}: {problem}", f"use the {kind} ids of the interaction log")
        if row_N.null_count and not gaps:
            missing = wanted.filter(row_N.is_null())
            problem = f"no vector for {len(missing)} of {len(wanted)} {kind}s (first: {_shown(missing)})"
            raise UserError(f"{self.where}: {problem}", remedy)
        return np.asarray(pc.fill_null(row_N, -1).to_numpy(), dtype=np.int64)


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
    suffix = _suffix(path, field)
    if suffix == ".parquet":
        if ids_path is not None:
            problem = f"field `{ids_field}`: {path} already has ids, in its column `id`"
            raise UserError(problem, f"leave `{ids_field}` out")
        rows, ids = _table(path)
    elif ids_path is None:
        raise UserError(f"{path} has no ids", f"set `{ids_field}` to a file with one id per row")
    else:
        existing(ids_path, ids_field)
        rows = _array(path) if suffix == ".npy" else _numbers(_tensor(path))
        ids = read_ids(ids_path)
    if rows.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {rows.dtype}, not numbers", "save the vectors as float32")
    _check_shape(path, rows.shape)
    if len(ids) != len(rows):
        problem = f"field `{ids_field}`: {ids_path} has {len(ids)} ids, but {path} has {len(rows)} rows"
        raise UserError(problem, "give one id per row, in order")
    return Vectors(f"field `{field}`: {path}", rows, _checked_ids(ids, ids_path or path))


def vectors_shape(path: str, field: str) -> tuple[int, ...]:
    """Return the shape of the vectors in a file, from its header and its first row.

    Args:
        path: see `read_vectors`.
        field: configuration field of `path`, for messages.

    Raises:
        UserError: the file is missing, or holds no vectors.
    """
    suffix = _suffix(path, field)
    if suffix == ".parquet":
        with _reading(path, _TABLE), pq.ParquetFile(resolve_path(path)) as file:
            (first,) = next(file.iter_batches(1, columns=["vector"]))["vector"]
            shape: tuple[int, ...] = (file.metadata.num_rows, len(first))
    else:
        shape = tuple(_array(path).shape if suffix == ".npy" else _tensor(path).shape)
    _check_shape(path, shape)
    return shape


def read_ids(path: str) -> pa.Array:
    """Read one id per row: the first column of a Parquet file, a `.npy` file of one axis, or the lines of a text file.

    Raises:
        UserError: the file does not have the format of its suffix.
    """
    suffix = Path(path).suffix
    if suffix == ".parquet":
        with _reading(path, "Parquet with a column of ids"):
            return _parquet(path).column(0).combine_chunks()
    if suffix == ".npy":
        array = _array(path)
        with _reading(path, "a list of ids with one axis"):
            if array.ndim != 1:
                raise ValueError(f"it has shape {array.shape}")
            return pa.array(array.astype(array.dtype.newbyteorder("=")))  # Arrow needs native byte order
    with _reading(path, "UTF-8 text with one id per line"):
        # split at \n only: an id may contain other characters that Python's splitlines would split at
        lines = Path(resolve_path(path)).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        return pa.array(lines if lines != [""] else [], type=pa.string())


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


def _suffix(path: str, field: str) -> str:
    """Return the suffix of an existing file of vectors, which says its format."""
    suffix = existing(path, field).suffix
    if suffix not in FORMATS:
        raise UserError(f"field `{field}`: {path} has an unknown format", f"use one of {', '.join(FORMATS)}")
    return suffix


def _check_shape(path: str, shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3) or 0 in shape:
        remedy = "save vectors with two axes: rows, dimension (three for users: rows, vectors of a user, dimension)"
        raise UserError(f"{path} has shape {shape}", remedy)


@contextmanager
def _reading(path: str, what: str) -> Iterator[None]:
    """Refuse a file of which a library cannot read what it should be; the error has the library's reason."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of any kind: NumPy parses a header as Python code
        reason = str(error).strip().partition("\n")[0]  # some libraries go on with advice to switch a protection off
        raise UserError(f"{path} is not {what}: {reason or type(error).__name__}", f"save it again as {what}") from None


def _array(path: str) -> npt.NDArray[np.generic]:
    """Map an array into memory; not by `np.load`, which also reads archives and pickles."""
    with _reading(path, "a plain array of np.save(file, np.asarray(values))"):
        array: npt.NDArray[np.generic] = np.lib.format.open_memmap(resolve_path(path), mode="r")
    return array


def _tensor(path: str) -> torch.Tensor:
    """Map the only tensor of a file into memory; by torch, because numpy has no bfloat16."""
    with _reading(path, "safetensors with one tensor"), safe_open(resolve_path(path), "pt") as file:
        names = list(file.keys())
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} tensors ({', '.join(names[:SHOWN])})")
        tensor: torch.Tensor = file.get_tensor(names[0])
    return tensor


def _numbers(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _parquet(path: str) -> pa.Table:
    with pq.ParquetFile(resolve_path(path), page_checksum_verification=True) as file:
        table = file.read()
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise ValueError(f"it has the column {twice[0]!r} twice")
    return table


def _table(path: str) -> tuple[npt.NDArray[np.generic], pa.Array]:
    """Read vectors and their ids from Parquet."""
    with _reading(path, _TABLE):
        table = _parquet(path)
        ids, vectors = (table[name].combine_chunks() for name in ("id", "vector"))
        lists = vectors.cast(pa.large_list(getattr(vectors.type, "value_type", pa.float32())))
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        dim = lengths[0] if len(lengths) else 0
        for row in np.flatnonzero(lengths != dim):
            raise ValueError(f"the vector of id {ids[row].as_py()!r} (row {row}) has {lengths[row]} numbers, not {dim}")
        # a null number becomes NaN, which is refused later
        return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), dim), ids


def _checked_ids(ids: pa.Array, path: str) -> pa.Array:
    """Return ids as integers or text; refuse others, missing ones, and repeated ones."""
    try:
        if pa.types.is_dictionary(ids.type):
            ids = ids.dictionary_decode()
        if pa.types.is_decimal(ids.type) and ids.type.scale == 0 and ids.type.precision > 18:
            ids = ids.cast(pa.string())  # a whole number that int64 may not hold
        if pa.types.is_floating(ids.type) or pa.types.is_decimal(ids.type):
            ids = ids.cast(pa.int64())
        if not any(is_kind(ids.type) for is_kind in _ID_TYPES):
            raise pa.ArrowInvalid(f"they are of type {ids.type}")
        text = ids.cast(pa.string())
    except pa.ArrowException as error:
        problem = f"{path}: its ids are neither whole numbers nor UTF-8 text: {error}"
        raise UserError(problem, "save the ids as integers or as text, as they are in the interaction log") from None
    missing = np.flatnonzero(pc.fill_null(pc.equal(text, ""), True).to_numpy(zero_copy_only=False))
    if missing.size:
        raise UserError(f"{path}: row {missing[0]} has no id", "give every row an id")
    counts = pc.value_counts(ids)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        problem = f"{path}: {len(repeated)} ids occur more than once (first: {_shown(repeated)})"
        raise UserError(problem, "keep one row per id")
    return ids


def _comparable(first: pa.Array, second: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Convert both to integers if both are integers, else both to text."""
    if pa.types.is_integer(first.type) and pa.types.is_integer(second.type):
        with suppress(pa.ArrowInvalid):  # unsigned integers may be too large
            return first.cast(pa.int64()), second.cast(pa.int64())
    return first.cast(pa.string()), second.cast(pa.string())


def _shown(ids: pa.Array) -> str:
    return ", ".join(repr(value)[:WIDTH] for value in ids[:SHOWN].to_pylist())
