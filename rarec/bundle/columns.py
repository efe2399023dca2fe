"""Columns of a catalogue that rules may name: read from a table beside the items' ids, each of one of five types.

Shape letters: N catalogue, R rows of the table.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rarec.bundle.conditions import DATED, KINDS
from rarec.config.schema import Prepare
from rarec.data.engines import open_engine
from rarec.data.engines.table_files import DELIMITED, TableLocation
from rarec.data.preparation.inputs import CANONICAL_INTEGER, ISO, as_text, table_location
from rarec.errors import UserError

_ROLE = "columns_"


def read_columns(
    prepare: Prepare, location: TableLocation, names: Sequence[str], ids: pa.Array, types: Mapping[str, pa.DataType]
) -> tuple[dict[str, pa.Array], pa.Array, list[str]]:
    """Read columns of a table for the items of a catalogue.

    Args:
        prepare: says how tables are read, and which column has the ids.
        location: of the table.
        names: of the columns.
        ids: of the catalogue, (N,).
        types: that columns must have, by name; of all others they are found.

    Returns:
        The columns by name, (N,), null where the table says nothing; the row of each item in the table, null where it
        has none, (N,); and the ids of the table that are not in the catalogue.

    Raises:
        UserError: the table cannot be read, lacks a column, or has values of another type.
    """
    roles = {f"{_ROLE}{place}": name for place, name in enumerate(names)}
    with (
        tempfile.TemporaryDirectory(prefix="rarec-") as scratch,
        open_engine(prepare, Path(scratch, "spill")) as engine,
    ):
        read = engine.read(location, {"item": str(prepare.items.item), **roles}, lines=True)
        rows = read.mutate(item=as_text(read["item"])).order_by("line").drop("line")
        table = pa.Table.from_batches(list(engine.batches(rows)), rows.schema().to_pyarrow())
    given, known = table["item"].cast(pa.string()), ids.cast(pa.string())
    row_N = pc.index_in(known, value_set=given)
    columns = {}
    for role, name in roles.items():
        try:
            whole = _typed(table[role].combine_chunks(), location.format in DELIMITED, types.get(name))
        except (ValueError, pa.ArrowException) as error:
            problem = f"{location.name}: column {name!r} does not hold {KINDS[types[name]]} in every row: {error}"
            raise UserError(problem, "correct it, or give the column another name") from None
        columns[name] = whole.take(row_N)
    unknown = given.filter(pc.invert(pc.fill_null(pc.is_in(given, value_set=known), True)))
    return columns, row_N, unknown.to_pylist()


def columns_of(prepare: Prepare, ids: pa.Array) -> dict[str, pa.Array]:
    """Return the columns that a configuration keeps for the rules of a bundle, (N,) each, by name.

    Raises:
        UserError: see `read_columns`; or the column of dates holds text or truths.
    """
    names, date = prepare.items.kept, prepare.items.date
    if not names:
        return {}
    location = table_location(prepare.items, "prepare.items")
    columns, *_ = read_columns(prepare, location, names, ids, {})
    date_of(columns, date, location)
    return columns


def date_of(columns: Mapping[str, pa.Array], date: str | None, location: TableLocation) -> str | None:
    """Return the name of the column of dates, if there is one.

    Raises:
        UserError: it holds text or truths.
    """
    if date is not None and (kind := KINDS[columns[date].type]) not in DATED:
        problem = f"{location.name}: column {date!r} ({location.field('date')}) holds {kind}"
        raise UserError(problem, "name a column of ISO 8601 times, or of numbers")
    return date


def _typed(column: pa.Array, is_text: bool, wanted: pa.DataType | None) -> pa.Array:
    """Return a column in one of the five types; a file of text has its values as text."""
    if is_text:
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
        return _parsed(column, wanted) if wanted else _found(column)
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    elif pa.types.is_integer(kind):
        column = column.cast(pa.int64())
    elif pa.types.is_temporal(kind):
        column = column.cast(pa.timestamp("us"))
    elif not pa.types.is_boolean(kind):
        column = column.cast(pa.string())
    return column.cast(wanted or column.type)


def _found(column: pa.Array) -> pa.Array:
    """Return text in the first type that takes all of it."""
    if column.null_count < len(column):
        for kind in _PATTERNS:
            with suppress(ValueError, pa.ArrowException):
                return _parsed(column, kind)
    return column


def _parsed(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return text in a type; times with an offset are converted to UTC."""
    wrong = column.filter(pc.invert(pc.match_substring_regex(column, _PATTERNS[kind])))
    if len(wrong):
        raise ValueError(repr(wrong[0].as_py()))
    if pa.types.is_boolean(kind):
        return pc.equal(pc.utf8_lower(column), "true")
    if pa.types.is_timestamp(kind) and pc.any(pc.match_substring_regex(column, r":[0-9.]+(Z|[+-][0-9:]+)$")).as_py():
        column = column.cast(pa.timestamp("us", "UTC"))
    return column.cast(kind)


_PATTERNS = {
    pa.bool_(): "(?i)^(true|false)$",
    pa.int64(): CANONICAL_INTEGER,
    pa.float64(): "^-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]+)?$",  # `007` is the text of a code
    pa.timestamp("us"): ISO,
    pa.string(): "",
}
"""What values of each type look like in a file of text, in the order in which types are tried."""
