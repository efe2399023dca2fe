"""Schemas of the prepared tables, and Parquet files whose bytes depend on the rows alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from rarec.errors import UserError

if TYPE_CHECKING:
    import ibis.expr.types as ir

ROW_GROUP = 1 << 17
"""Rows of a row group: fixed, so that an engine's batch size does not change the file."""

ITEMS, USERS, INTERACTIONS = "items.parquet", "users.parquet", "interactions.parquet"
ID_TYPES = (pa.int64(), pa.string())
REBUILD = "rebuild it: rarec prepare CONFIG --fresh"


def id_type(column: "ir.Column") -> pa.DataType:
    """Return the Arrow type in which ids are stored: text stays text, numbers are int64."""
    return pa.string() if column.type().is_string() else pa.int64()


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


def write_rows(rows: Iterable[pa.RecordBatch], path: Path, schema: pa.Schema) -> int:
    """Stream record batches into a Parquet file with row groups of a fixed size.

    Args:
        rows: record batches with at least the columns of the schema.
        path: file to write.
        schema: columns and types of the file.

    Returns:
        The number of rows.
    """
    total, pending = 0, pa.table({name: pa.array([], kind) for name, kind in _types(schema)}, schema=schema)
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


def table_shape(path: Path, schemas: Sequence[pa.Schema]) -> tuple[int, pa.Schema]:
    """Return the number of rows of a table, and its schema.

    Args:
        path: Parquet file; only its end is read.
        schemas: the schemas that it may have.

    Raises:
        UserError: the file has another schema, or is not Parquet.
    """
    try:
        with pq.ParquetFile(path) as file:
            rows, schema = file.metadata.num_rows, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", REBUILD) from None
    if schema not in schemas:
        raise UserError(f"{path} does not have the columns {', '.join(schemas[0].names)}, or their types", REBUILD)
    return rows, schema


def read_columns(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read columns of a Parquet file, all of them by default.

    `pq.read_table` uses Arrow's dataset scanner, which hangs if its threads cannot be started.
    """
    with pq.ParquetFile(path) as file:
        return file.read(columns)


def _schema(fields: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


def _types(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.type) for field in schema]
