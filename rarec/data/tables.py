"""The prepared dataset's tables on disk: their schemas, and Parquet whose bytes depend on the rows alone."""

from collections.abc import Iterable
from pathlib import Path

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.errors import UserError

ROW_GROUP = 1 << 17
"""Rows; how an engine happens to cut its batches must not show in the file."""

ITEMS, USERS, INTERACTIONS = "items.parquet", "users.parquet", "interactions.parquet"
ID_TYPES = (pa.int64(), pa.string())


def id_type(column: ir.Column) -> pa.DataType:
    """How ids are written: as they were given, numbers or text."""
    return pa.string() if column.type().is_string() else pa.int64()


def items_schema(item_id: pa.DataType) -> pa.Schema:
    """One row an item, in the order of the rows; `cold` ones were never met in training."""
    texts = {"title": pa.string(), "text": pa.string()}
    return _schema({"row": pa.int32(), "item_id": item_id, **texts, "train_count": pa.int64(), "cold": pa.bool_()})


def users_schema(user_id: pa.DataType) -> pa.Schema:
    """One row a user; `start` and `length` are the user's slice of the interactions; `cold` ones have no sample."""
    places = dict.fromkeys(("length", "train_length", "validation", "test"), pa.int32())
    return _schema({"row": pa.int32(), "user_id": user_id, "start": pa.int64(), **places, "cold": pa.bool_()})


def interactions_schema(order: str) -> pa.Schema:
    """One row an interaction, by user and then in the user's order."""
    return _schema({"user_row": pa.int32(), "item_row": pa.int32(), order: pa.float64()})


def write_rows(rows: Iterable[pa.RecordBatch], path: Path, schema: pa.Schema) -> int:
    """Stream rows into a Parquet file, in row groups of one size; returns how many there were."""
    total, waiting = 0, pa.table({name: pa.array([], kind) for name, kind in _types(schema)}, schema=schema)
    # dictionaries of rows and ids only cost: half the time and two thirds of the bytes without them
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for batch in rows:
            part = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
            total, waiting = total + part.num_rows, pa.concat_tables([waiting, part])
            while waiting.num_rows >= ROW_GROUP:
                writer.write_table(waiting.slice(0, ROW_GROUP), row_group_size=ROW_GROUP)
                waiting = waiting.slice(ROW_GROUP)
        if waiting.num_rows:
            writer.write_table(waiting.combine_chunks(), row_group_size=ROW_GROUP)
    return total


def read_rows(path: Path, schemas: list[pa.Schema], columns: list[str]) -> pa.Table:
    """Some columns of a table that was written in one of these schemas.

    Raises:
        UserError: it was not, or is no Parquet.
    """
    remedy = "make it again: rarec prepare CONFIG --fresh"
    try:
        if pq.read_schema(path) not in schemas:
            raise UserError(f"{path} has other columns than {', '.join(schemas[0].names)}, or of other types", remedy)
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", remedy) from None


def _schema(fields: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


def _types(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.type) for field in schema]
