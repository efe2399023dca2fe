"""The prepared tables: their schemas, Parquet files whose bytes depend on the rows alone, and memory-mapped columns.

Parquet is what other programs read; it has to be decoded and cannot be mapped. So each column is written once more, and
a dataset of any size opens at once: numbers as a `.npy` file, ids and texts as an Arrow file in batches of `ROW_GROUP`.
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.errors import UserError

T = TypeVar("T", covariant=True)
Rows = npt.NDArray[np.integer]

ROW_GROUP = 1 << 17
"""Rows of a row group: fixed, so that an engine's batch size does not change the file."""

ITEMS, USERS, INTERACTIONS = "items.parquet", "users.parquet", "interactions.parquet"
REBUILD = "rebuild it: rarec prepare CONFIG --fresh"
FOLDER = "columns"
NUMBERS = ("start", "length", "train_length", "validation", "test", "train_count", "item_row")
TEXTS = ("user_id", "item_id", "title", "text")
"""Columns that are written once more: numbers, and ids, which may be numbers, and texts."""


def items_schema(item_id: pa.DataType) -> pa.Schema:
    """Return the schema of `items.parquet`: one row per item; a `cold` item has no training interaction."""
    texts = {"title": pa.string(), "text": pa.string()}
    return _schema({"row": pa.int32(), "item_id": item_id, **texts, "train_count": pa.int64(), "cold": pa.bool_()})


def users_schema(user_id: pa.DataType) -> pa.Schema:
    """Return the schema of `users.parquet`: one row per user.

    `start` and `length` are the user's slice of the interactions; a `cold` user has no training sample.
    """
    places = dict.fromkeys(("length", "train_length", "validation", "test"), pa.int32())
    return _schema({"row": pa.int32(), "user_id": user_id, "start": pa.int64(), **places, "cold": pa.bool_()})


def interactions_schema(order: str) -> pa.Schema:
    """Return the schema of `interactions.parquet`: one row per interaction, by user, in the user's order."""
    return _schema({"user_row": pa.int32(), "item_row": pa.int32(), order: pa.float64()})


def write_rows(rows: Iterable[pa.RecordBatch], path: Path | BinaryIO, schema: pa.Schema) -> int:
    """Stream record batches into a Parquet file with row groups of a fixed size.

    Args:
        rows: record batches with at least the columns of the schema.
        path: file to write, or an open one.
        schema: columns and types of the file.

    Returns:
        The number of rows.
    """
    total, pending = 0, schema.empty_table()
    # without dictionary encoding: half the time and two thirds of the bytes
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for batch in rows:
            part = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
            total, pending = total + part.num_rows, pa.concat_tables([pending, part])
            while pending.num_rows >= ROW_GROUP:
                writer.write_table(pending.slice(0, ROW_GROUP), row_group_size=ROW_GROUP)
                pending = pending.slice(ROW_GROUP)
        if pending.num_rows:
            writer.write_table(pending.combine_chunks(), row_group_size=ROW_GROUP)
    return total


def read_columns(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read columns of a Parquet file, all of them by default.

    `pq.read_table` uses Arrow's dataset scanner, which hangs if its threads cannot be started.
    """
    with pq.ParquetFile(path) as file:
        return file.read(columns)


class Column(Sequence[T]):
    """A column of ids or texts; a value is read on access.

    Args:
        values: in chunks of `ROW_GROUP` rows, but for the last.
    """

    def __init__(self, values: pa.ChunkedArray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        value: T = self._values[index].as_py()
        return value

    def __iter__(self) -> Iterator[T]:
        for chunk in self._values.chunks:
            yield from chunk.to_pylist()

    def take(self, rows: Rows) -> pa.Array:
        """Return the values of some rows, in their order."""
        rows = np.asarray(rows, np.int64)
        chunks = rows // ROW_GROUP
        order = np.argsort(chunks, kind="stable")
        parts = [
            self._values.chunk(int(chunk)).take(pa.array(rows[chunks == chunk] - chunk * ROW_GROUP))
            for chunk in np.unique(chunks)
        ]
        if not parts:
            return pa.array([], self._values.type)
        return pa.concat_arrays(parts).take(pa.array(np.argsort(order)))

    def whole(self) -> pa.Array:
        """Return all values as one array in memory."""
        return self._values.combine_chunks()


def write_columns(directory: Path) -> None:
    """Write the columns of a prepared dataset from its tables, a row group at a time."""
    (directory / FOLDER).mkdir()
    for table in (USERS, ITEMS, INTERACTIONS):
        with pq.ParquetFile(directory / table) as file:
            for column in file.schema_arrow:
                _write_column(_path(directory, table, column.name), file, column)


def _write_column(path: Path, file: pq.ParquetFile, column: pa.Field) -> None:
    """Write a column of a table, if it is one of `NUMBERS` or `TEXTS`."""
    parts = (file.read_row_group(group, [column.name]).combine_chunks() for group in range(file.num_row_groups))
    if column.name in NUMBERS:
        arrays = (part.column(0).to_numpy() for part in parts)
        with path.open("wb") as numbers:
            write_npy(numbers, np.dtype(column.type.to_pandas_dtype()), file.metadata.num_rows, arrays)
    elif column.name in TEXTS:
        with pa.ipc.new_file(str(path), pa.schema([column])) as texts:
            for part in parts:
                texts.write_table(part)


def _path(directory: Path, table: str, name: str) -> Path:
    return directory / FOLDER / f"{Path(table).stem}.{name}{'.npy' if name in NUMBERS else '.arrow'}"


def number_column(directory: Path, table: str, name: str) -> npt.NDArray[Any]:
    """Map a column of numbers of a prepared dataset, which `write_columns` wrote."""
    return np.asarray(map_npy(_path(directory, table, name), REBUILD))


def text_column(directory: Path, table: str, name: str) -> Column[Any]:
    """Map a column of ids or texts of a prepared dataset, which `write_columns` wrote."""
    path = _path(directory, table, name)
    if not path.is_file():
        raise UserError(f"{path} is missing", REBUILD)
    with pa.memory_map(str(path)) as file:
        return Column(pa.ipc.open_file(file).read_all().column(name))


def write_npy(file: BinaryIO, dtype: np.dtype[Any], rows: int, parts: Iterable[npt.NDArray[Any]]) -> None:
    """Write a `.npy` array of one dimension in parts, so that it need not fit in memory.

    By plain writes: on a full disk, a mapped file would kill the process.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(part.tobytes())


def map_npy(path: Path, remedy: str) -> npt.NDArray[Any]:
    """Map a `.npy` array of numbers; nothing in the file is executed.

    Raises:
        UserError: the file is missing or is not an array.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing", remedy)
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy raises exceptions of many kinds on a malformed header
        raise UserError(f"{path} cannot be read: {error}", remedy) from None
    return array


def release_pages(array: object) -> None:
    """Release the resident pages of a memory-mapped array; other arrays are left alone.

    The pages count as memory of this process although they are only a cache of the file, and are reloaded on access.
    """
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap):
        array.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Scratch:
    """Space for large arrays that are computed: in memory while they are small, else in a file without a name.

    Attributes:
        bytes: size of the largest array in memory.
        directory: where larger ones are kept; made if need be. Without it, every array is in memory.
    """

    bytes: int = 0
    directory: Path | None = None

    def zeros(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of zeros. Its file, if it has one, ends with the process.

        Raises:
            OSError: the disk has no room for it.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self.directory is None or size <= self.bytes:
            return np.zeros(shape, dtype)
        self.directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=self.directory) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # now: a mapped file on a full disk would kill the process
            return np.memmap(file, dtype, "r+", shape=tuple(shape)).view(np.ndarray)


IN_MEMORY = Scratch()
"""Keeps every array in memory."""


def _schema(fields: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])
