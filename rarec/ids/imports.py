"""Vectors made elsewhere, read and laid out in the prepared dataset's rows.

Shape letters: R rows of a file, N rows of the dataset (items or users), K vectors a row, E dimension.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from rarec.errors import UserError
from rarec.paths import resolve

CHUNK = 1 << 16
"""Rows copied at a time."""
SHOWN = 5
"""Ids named in an error."""


@dataclass(frozen=True)
class Vectors:
    """Vectors as a file holds them.

    Attributes:
        path: as the user named it.
        rows: (R, E), or (R, K, E); memory-mapped where the format allows it.
        ids: (R,) the original id of each row.
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
            wanted: (N,) original ids; compared as text where the two types differ.
            of: what the ids name, `item` or `user`, for messages.
            remedy: what to do about missing ids.
            gaps: some may be missing: theirs are zero vectors.

        Returns:
            How many rows of the file were not wanted, and which of N have a zero vector, as in the file or for a gap.

        Raises:
            UserError: a wanted id has no row (with `gaps`: none has), or its vector is not finite.
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
        """The file's row of each wanted id; -1 for a gap."""
        wanted, own = _comparable(wanted, self.ids)
        place_N = pc.index_in(wanted, value_set=own)
        if place_N.null_count == len(wanted):
            problem = f"{self.path}: its ids ({_shown(own)}) are none of the {of}s' ({_shown(wanted)})"
            raise UserError(problem, f"name each row by the {of}'s id as the log has it")
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
        ids_path: one id a row, in order; needed unless the vectors are Parquet, and only then.
        field: of the configuration, for messages.
        ids_field: likewise.

    Raises:
        UserError: a file is missing, of another format or pickled, rows are ragged, or ids and rows do not match.
    """
    suffix = existing(path, field).suffix
    if suffix not in READERS:
        raise UserError(f"field `{field}`: {path} is of no known format", f"give one of {', '.join(READERS)}")
    rows, ids = READERS[suffix](path)
    if ids is not None and ids_path is not None:
        raise UserError(
            f"field `{ids_field}`: {path} has ids of its own, in its column `id`", f"leave `{ids_field}` out"
        )
    if ids is None:
        if ids_path is None:
            raise UserError(
                f"{path}: nothing says which id each row belongs to", f"name a list of ids as `{ids_field}`"
            )
        existing(ids_path, ids_field)
        ids = read_ids(ids_path)
    if rows.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {rows.dtype}, not numbers", "save the vectors as float32")
    if rows.ndim < 2 or 0 in rows.shape:
        raise UserError(f"{path} has shape {rows.shape}", "vectors have two axes: rows, dimension")
    if len(ids) != len(rows):
        raise UserError(f"{ids_path} names {len(ids)} ids, but {path} has {len(rows)} rows", "one id a row, in order")
    _refuse_bad_ids(ids, ids_path or path)
    return Vectors(path, rows, ids)


def read_ids(path: str) -> pa.Array:
    """One id a row: the first column of a Parquet file, a `.npy` file of one axis, or the lines of a text file.

    Raises:
        UserError: the file is not of the format that its name says.
    """
    file = Path(resolve(path))
    if file.suffix == ".parquet":
        return _parquet(path).column(0).combine_chunks()
    if file.suffix == ".npy":
        array = _npy(path)
        if array.ndim != 1:
            raise UserError(f"{path} has shape {array.shape}", "a list of ids has one axis")
        return pa.array(array.astype(array.dtype.newbyteorder("=")))  # Arrow takes this machine's order of bytes alone
    try:  # lines end where Unix and Windows end them: an id may hold what Python takes for other ends
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        return pa.array(lines if lines != [""] else [], type=pa.string())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}", "save it as UTF-8, one id a line") from None


def existing(path: str, field: str) -> Path:
    """The file that a field of the configuration names.

    Raises:
        UserError: it does not exist.
    """
    file = Path(resolve(path))
    if not file.is_file():
        raise UserError(f"field `{field}`: {path} does not exist", "paths are relative to the current directory")
    return file


def _npy(path: str) -> npt.NDArray[np.generic]:
    try:
        array: npt.NDArray[np.generic] = np.load(resolve(path), mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        remedy = "save a plain array: np.save(file, np.asarray(values)), not objects and not pickled"
        raise UserError(f"{path} is not a plain .npy array: {error}", remedy) from None
    return array


def _parquet(path: str) -> pa.Table:
    try:
        return pq.read_table(resolve(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not Parquet: {error}") from None


def _read_npy(path: str) -> tuple[npt.NDArray[np.generic], None]:
    return _npy(path), None


def _read_safetensors(path: str) -> tuple[npt.NDArray[np.generic], None]:
    try:
        with safe_open(resolve(path), "pt") as file:  # torch reads bfloat16, numpy does not
            names = list(file.keys())
            if len(names) != 1:
                shown = ", ".join(names[:SHOWN])
                raise UserError(f"{path} holds {len(names)} tensors ({shown})", "save the one tensor of vectors alone")
            return file.get_tensor(names[0]).float().numpy(), None
    except SafetensorError as error:
        raise UserError(f"{path} is not safetensors: {error}") from None


def _read_parquet(path: str) -> tuple[npt.NDArray[np.generic], pa.Array]:
    table = _parquet(path)
    if not {"id", "vector"} <= set(table.column_names):
        found = ", ".join(table.column_names)
        raise UserError(f"{path} has columns {found}", "vectors need the columns `id` and `vector`")
    ids, vectors = (table[name].combine_chunks() for name in ("id", "vector"))
    if not (pa.types.is_list(vectors.type) or pa.types.is_large_list(vectors.type)):
        if not pa.types.is_fixed_size_list(vectors.type):
            raise UserError(f"{path}: column `vector` is {vectors.type}", "it must be a list of numbers")
        vectors = vectors.cast(pa.large_list(vectors.type.value_type))
    lengths = pc.fill_null(pc.list_value_length(vectors), 0).to_numpy()
    ragged = np.flatnonzero(lengths != lengths[0]) if len(lengths) else np.empty(0, dtype=np.int64)
    if ragged.size:
        row = int(ragged[0])
        problem = (
            f"the vector of id {ids[row].as_py()!r} (row {row}) has {lengths[row]} numbers, row 0 has {lengths[0]}"
        )
        raise UserError(f"{path}: {problem}", "every vector needs the same dimension")
    flat = vectors.flatten().to_numpy(zero_copy_only=False)  # a null number becomes NaN, and is refused as one
    return flat.reshape(len(ids), lengths[0] if len(lengths) else 0), ids


READERS: dict[str, Callable[[str], tuple[npt.NDArray[np.generic], pa.Array | None]]] = {
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
    ".parquet": _read_parquet,
}
"""Vectors, and their ids where the format holds them, by the file's suffix."""


def _comparable(one: pa.Array, other: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Both as integers where both are, else both as text."""
    if all(pa.types.is_integer(ids.type) for ids in (one, other)):
        with suppress(pa.ArrowInvalid):  # unsigned ones may be too large
            return one.cast(pa.int64()), other.cast(pa.int64())
    return one.cast(pa.string()), other.cast(pa.string())


def _refuse_bad_ids(ids: pa.Array, path: str) -> None:
    if ids.null_count:
        row = int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{path}: row {row} has no id", "give every row an id")
    counts = pc.value_counts(ids)
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise UserError(
            f"{path}: {len(repeated)} ids occur more than once (first: {_shown(repeated)})", "keep one row an id"
        )


def _shown(ids: pa.Array) -> str:
    return ", ".join(repr(value) for value in ids[:SHOWN].to_pylist())
