"""Read the two inputs of a preparation, the log and the catalogue, in the form that the steps need."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ibis
import ibis.expr.types as ir

from rarec.config.schema import Interactions, Items, Prepare, Table
from rarec.data.engines import InputTable, NamedTable, PrepareEngine, TableLocation, compute_value
from rarec.data.engines.table_files import find_files, hash_files
from rarec.data.preparation import columns, steps
from rarec.errors import UserError, without_password
from rarec.storage.artefacts import sha256_json


def table_location(table: Table, field: str) -> TableLocation:
    """Return the location of a table of the configuration.

    Raises:
        UserError: its files do not exist, or are not of one known format.
    """
    return NamedTable(table.table) if table.table is not None else find_files(str(table.path), f"{field}.path")


def input_hashes(config: Prepare) -> dict[str, str]:
    """Return the hashes of the log and of the catalogue.

    A database table is identified by its name and engine alone; run with `--fresh` when its rows have changed.

    Raises:
        UserError: the files do not exist.
    """
    hashes = {}
    for name in ("interactions", "items"):
        location = table_location(getattr(config, name), f"prepare.{name}")
        if isinstance(location, NamedTable):
            hashes[name] = sha256_json([without_password(config.engine), location.name])
        else:
            hashes[name] = hash_files(location)
    return hashes


@dataclass(frozen=True)
class Catalogue:
    """The items, one row each, and the counts of rows that were dropped or changed.

    Attributes:
        table: columns `line`, `item`, `title`, `text`.
        counts: rows, rows_without_id, repeated_ids, untitled.
        name: name of the table, for messages.
    """

    table: ir.Table
    counts: dict[str, int]
    name: str

    def report(self, config: Items, say: Callable[[str], None]) -> None:
        """Print what was dropped or changed."""
        messages = {
            "rows_without_id": "rows without an item id: dropped",
            "repeated_ids": "rows repeat an item id: only the first row of each id is kept",
            "untitled": f"items have no title: replaced by {config.untitled!r} (prepare.items.untitled)",
        }
        for name, text in messages.items():
            if self.counts[name]:
                say(f"{self.name}: {self.counts[name]:,} {text}")


def read_catalogue(
    engine: PrepareEngine, config: Items, location: TableLocation, say: Callable[[str], None]
) -> Catalogue:
    """Read the items; keep the first row of each id, and fill in missing titles.

    Args:
        engine: engine that reads.
        config: the section `prepare.items`.
        location: the table.
        say: print one line to the user.

    Raises:
        UserError: no row has an id; or see `PrepareEngine.read`.
    """
    texts = {f"text_{index}": name for index, name in enumerate(config.text)}
    read = engine.read(location, {"item": config.item, "title": config.title, **texts}, "prepare.items", lines=True)
    further = [columns.clean_text(read.table[role]) for role in texts]
    name = location.name
    table = read.table.select(
        "line",
        item=_id_column(engine, read, "item", "prepare.items.item", name),
        given=columns.clean_text(read.table.title),
        text=ibis.literal(", ").join(further).fill_null("") if further else ibis.literal(""),
    )
    rows = _count_rows(engine, config, table, name)
    table = steps.first_row_per_item(table.filter(table["item"].notnull()))
    table = table.mutate(title=table.given.fill_null(config.untitled), untitled=table.given.isnull()).drop("given")
    kept = engine.keep("catalogue", table)
    counts = {
        "rows": rows["rows"],
        "rows_without_id": rows["rows_without_id"],
        "repeated_ids": rows["rows"] - rows["rows_without_id"] - rows["ids"],
        "untitled": compute_value(engine, kept.untitled.sum()),
    }
    catalogue = Catalogue(kept.drop("untitled"), counts, name)
    catalogue.report(config, say)
    return catalogue


def _count_rows(engine: PrepareEngine, config: Items, table: ir.Table, name: str) -> dict[str, int]:
    """Count the rows of a catalogue, those without an id, and the ids; refuse one without ids, or with two headers."""
    ids = table["item"]
    header = (ids.cast("string") == config.item) & (table.given == config.title)
    counted = {"rows": table.count(), "rows_without_id": ids.isnull().sum(), "ids": ids.nunique()}
    rows = engine.rows(table.agg(**counted, header=table.line.min(where=header)))[0]
    _check_not_empty(rows["rows"], name)
    if rows["header"] is not None:
        problem = f"{name}, data row {rows['header']}: the header again, as where files were joined to one"
        raise UserError(problem, "name the files by a pattern such as items-*.csv, or remove that row")
    if not rows["ids"]:
        problem = f"{name}: column {config.item!r} is empty in every row"
        raise UserError(problem, "set prepare.items.item to the column of item ids")
    return rows


def read_log(engine: PrepareEngine, config: Interactions, location: TableLocation, *, lines: bool = False) -> ir.Table:
    """Read the interactions as a raw log (see `steps`), with the column `line` if requested.

    Raises:
        UserError: the table has no rows; or see `PrepareEngine.read`.
    """
    role, name = _order_column(config)
    roles = {"user": config.user, "item": config.item, role: name}
    read = engine.read(location, roles, "prepare.interactions", lines=lines)
    given = read.table[role]
    temporal = given.type().is_temporal()
    counted = {"rows": read.table.count(), "given": given.count()}
    if not temporal:
        size = columns.as_number(given).abs()
        counted |= {"numbers": size.count(), "smallest": size.min(), "largest": size.max()}
    known = engine.rows(read.table.agg(**counted))[0]
    _check_not_empty(known["rows"], location.name)
    largest = known.get("largest") or 0.0
    if role == "time" or temporal:
        unit = _unit(largest) if config.time_unit == "auto" else config.time_unit
        order = columns.as_seconds(given, columns.UNITS[unit])
        if not lines and not temporal:
            _check_one_kind(engine, config, location, given, known, unit)
    else:
        order = columns.as_number(given)
        if largest > columns.MAX_EXACT:
            problem = f"{location.name}: prepare.interactions.position {name!r} holds numbers above 2**53"
            raise UserError(f"{problem}, which lose their order", "use ranks within the user, or a time column")
    ids = {
        role: _id_column(engine, read, role, f"prepare.interactions.{role}", location.name) for role in ("user", "item")
    }
    kept = ["line"] if lines else []
    return read.table.select(*kept, **ids, given=given.cast("string"), order=order)


def check_order(engine: PrepareEngine, config: Interactions, location: TableLocation, log: ir.Table) -> None:
    """Check that every row of a log has a valid time or position.

    Args:
        engine: engine that reads.
        config: the section `prepare.interactions`.
        location: where the log is.
        log: the raw log, without rows that lack an id.

    Raises:
        UserError: a row lacks it; the message names the first such row.
    """
    count = compute_value(engine, log.order.isnull().sum())
    if not count:
        return
    numbered = steps.drop_missing_ids(read_log(engine, config, location, lines=True))
    row = _first_row(engine, numbered.filter(numbered.order.isnull()))
    role, name = _order_column(config)
    value = f"is {row['given']!r}" if row["given"] is not None else "is missing"
    wanted = "epoch seconds or milliseconds, or ISO 8601, from 1900 to 2200," if role == "time" else "a number"
    where = f"{location.name}, data row {row['line']} (user {row['user']!r}, item {row['item']!r})"
    remedy = f"prepare.interactions.{role} needs {wanted} in every row: correct or remove these rows"
    raise UserError(f"{where}: {name} {value}; {count} such rows", remedy)


def _order_column(config: Interactions) -> tuple[str, str]:
    """Return the role and the name of the column that orders the log."""
    return ("time", config.time) if config.time is not None else ("position", str(config.position))


def _first_row(engine: PrepareEngine, rows: ir.Table) -> dict[str, Any]:
    return engine.rows(rows.order_by("line").limit(1))[0]


def _unit(largest: float) -> str:
    """Return the unit of a column of epoch times, by its largest magnitude."""
    return next(unit for unit, limit in columns.UNIT_LIMITS.items() if largest < limit)


def _check_one_kind(
    engine: PrepareEngine,
    config: Interactions,
    location: TableLocation,
    given: ir.Column,
    known: Mapping[str, Any],
    unit: str,
) -> None:
    """Check that a column of times does not mix dates and numbers, or, where the unit is not given, two units.

    Raises:
        UserError: it does; the message names a row of each kind.
    """
    units = list(columns.UNITS)
    smaller = units[: units.index(unit)]
    mixes_dates = (
        given.type().is_string()
        and 0 < known["numbers"] < known["given"]
        and compute_value(engine, columns.iso_seconds(given).notnull().sum())
    )
    if mixes_dates:
        mixture, remedy = "numbers and dates", "write all times as dates, or all as numbers"
    elif config.time_unit == "auto" and smaller and known["smallest"] < columns.UNIT_LIMITS[smaller[-1]]:
        mixture = f"epoch times in {_unit(known['smallest'])} and in {unit}"
        remedy = f"write all in one unit; if all are in {unit}, say so: prepare.interactions.time_unit={unit}"
    else:
        return
    log = read_log(engine, config, location, lines=True)
    log = log.filter(log.given.notnull())
    if mixes_dates:
        log = log.mutate(is_first=columns.iso_seconds(log.given).notnull())
    else:
        log = log.mutate(is_first=columns.as_number(log.given).abs() < columns.UNIT_LIMITS[smaller[-1]])
    rows = [_first_row(engine, log.filter(part)) for part in (log.is_first, ~log.is_first)]
    examples = " and ".join(f"{row['given']!r} in data row {row['line']}" for row in rows)
    problem = f"{location.name}: prepare.interactions.time {config.time!r} mixes {mixture}: {examples}"
    raise UserError(problem, remedy)


def _check_not_empty(rows: int, name: str) -> None:
    if not rows:
        raise UserError(f"{name} has a header but no rows", "provide a table with at least one row")


def _id_column(engine: PrepareEngine, read: InputTable, role: str, field: str, name: str) -> ir.Column:
    """Return a column of ids as int64 if all values are integers, else as text.

    Raises:
        UserError: the ids are floats with a fraction, which engines format differently and which may collide.
    """
    column = read.table[role]
    kind = column.type()
    if kind.is_signed_integer():
        return column.cast("int64")
    if kind.is_floating():
        _check_whole(engine, column, name, field)
    text = columns.as_text(column)
    numbers = kind.is_numeric() or role in read.untyped
    if numbers and compute_value(engine, columns.all_canonical_integers(text)):
        return text.cast("int64")
    return text


def _check_whole(engine: PrepareEngine, column: ir.FloatingColumn, name: str, field: str) -> None:
    number = column.cast("float64")
    infinite = number.cast("string").lower().contains("inf")
    present = columns.is_finite(number) | infinite  # NaN is a missing value, as in pandas
    fractional = compute_value(engine, (present & ~columns.is_integer(number)).sum())
    if fractional:
        problem = f"{name}: {field}: the column holds floats, {fractional} of them not integers up to 2**53"
        raise UserError(problem, "write ids as integers of up to 18 digits, or as text, in quotes in JSON")
