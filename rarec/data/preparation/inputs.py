"""Read the two inputs of a preparation, the log and the catalogue, in the form that the steps need."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ibis
import ibis.expr.types as ir

from rarec.config.logs import Interactions, Items, Prepare, Table
from rarec.data.engines import InputTable, NamedTable, PrepareEngine, TableLocation, compute_value, display_name
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
    roles = {"item": config.item, "title": config.title, **texts}
    read = engine.read(location, roles, "prepare.items", lines=True)
    further = [columns.clean_text(read.table[role]) for role in texts]
    table = read.table.select(
        "line",
        item=_id_column(engine, read, "item", "prepare.items.item", display_name(location)),
        given=columns.clean_text(read.table.title),
        text=ibis.literal(", ").join(further).fill_null("") if further else ibis.literal(""),
    )
    name, ids = display_name(location), table["item"]
    again = (ids.cast("string") == config.item) & (table.given == config.title)
    counted = {"rows": table.count(), "rows_without_id": ids.isnull().sum(), "ids": ids.nunique()}
    rows = engine.rows(table.agg(**counted, header=table.line.min(where=again)))[0]
    if not rows["rows"]:
        raise _empty_table_error(name)
    if rows["header"] is not None:
        problem = f"{name}, data row {rows['header']}: the header again, as where files were joined to one"
        raise UserError(problem, "name the files by a pattern such as items-*.csv, or remove that row")
    if not rows["ids"]:
        raise UserError(
            f"{name}: column {config.item!r} is empty in every row", "set prepare.items.item to the column of item ids"
        )
    table = steps.first_row_per_item(table.filter(table["item"].notnull()))
    table = table.mutate(title=table.given.fill_null(config.untitled), untitled=table.given.isnull()).drop("given")
    kept = engine.keep("catalogue", table)
    repeated = rows["rows"] - rows["rows_without_id"] - rows["ids"]
    counts = {name: rows[name] for name in ("rows", "rows_without_id")}
    counts |= {"repeated_ids": repeated, "untitled": compute_value(engine, kept.untitled.sum())}
    found = Catalogue(kept.drop("untitled"), counts, name)
    _report_problems(found, config, say)
    return found


def _report_problems(catalogue: Catalogue, config: Items, say: Callable[[str], None]) -> None:
    messages = {
        "rows_without_id": "rows without an item id: dropped",
        "repeated_ids": "rows repeat an item id: only the first row of each id is kept",
        "untitled": f"items have no title: replaced by {config.untitled!r} (prepare.items.untitled)",
    }
    for what, text in messages.items():
        if catalogue.counts[what]:
            say(f"{catalogue.name}: {catalogue.counts[what]:,} {text}")


def read_log(engine: PrepareEngine, config: Interactions, location: TableLocation, *, lines: bool = False) -> ir.Table:
    """Read the interactions as a raw log (see `steps`), with the column `line` if requested.

    Raises:
        UserError: the table has no rows; or see `PrepareEngine.read`.
    """
    role, name = ("time", config.time) if config.time is not None else ("position", str(config.position))
    read = engine.read(
        location, {"user": config.user, "item": config.item, role: name}, "prepare.interactions", lines=lines
    )
    given = read.table[role]
    found = {"rows": read.table.count(), "given": given.count()}
    if not given.type().is_temporal():
        size = columns.as_number(given).abs()
        found |= {"numbers": size.count(), "smallest": size.min(), "largest": size.max()}
    known = engine.rows(read.table.agg(**found))[0]
    if not known["rows"]:
        raise _empty_table_error(display_name(location))
    if role == "time" or given.type().is_temporal():
        unit = config.time_unit if config.time_unit != "auto" else _unit(known.get("largest"))
        order = columns.as_seconds(given, columns.UNITS[unit])
        if not lines and "numbers" in known and (mixed := _mixed(engine, given, known, config, unit)):
            raise _mixed_error(engine, config, location, *mixed)
    else:
        order = columns.as_number(given)
        if (known.get("largest") or 0.0) > columns.MAX_EXACT:
            problem = f"{display_name(location)}: prepare.interactions.position {name!r} holds numbers above 2**53"
            raise UserError(f"{problem}, which lose their order", "use ranks within the user, or a time column")
    named = {
        role: _id_column(engine, read, role, f"prepare.interactions.{role}", display_name(location))
        for role in ("user", "item")
    }
    kept = ["line"] if lines else []
    return read.table.select(*kept, **named, given=given.cast("string"), order=order)


def _unit(largest: float | None) -> str:
    """Return the unit of a column of epoch times, by its largest magnitude."""
    return next(unit for unit, limit in columns.UNIT_LIMITS.items() if (largest or 0.0) < limit)


def _mixed(
    engine: PrepareEngine, given: ir.Column, known: Mapping[str, Any], config: Interactions, unit: str
) -> tuple[str, str, Callable[[ir.Column], ir.BooleanColumn]] | None:
    """Return what a column of times mixes, the remedy, and a test for the one kind; None if all are of one."""
    partly = given.type().is_string() and 0 < known["numbers"] < known["given"]
    if partly and compute_value(engine, _is_date(given).sum()):
        return "numbers and dates", "write all times as dates, or all as numbers", _is_date
    units = list(columns.UNITS)
    smaller = units[: units.index(unit)]
    if config.time_unit == "auto" and smaller and known["smallest"] < columns.UNIT_LIMITS[smaller[-1]]:
        other = _unit(known["smallest"])
        remedy = f"write all in one unit; if all are in {unit}, say so: prepare.interactions.time_unit={unit}"
        return f"epoch times in {other} and in {unit}", remedy, lambda text: _is_smaller(text, smaller[-1])
    return None


def _is_date(text: ir.Column) -> ir.BooleanColumn:
    return columns.iso_seconds(text).notnull()


def _is_smaller(text: ir.Column, unit: str) -> ir.BooleanColumn:
    return columns.as_number(text).abs() < columns.UNIT_LIMITS[unit]


def _mixed_error(
    engine: PrepareEngine,
    config: Interactions,
    location: TableLocation,
    what: str,
    remedy: str,
    which: Callable[[ir.Column], ir.BooleanColumn],
) -> UserError:
    """Return the error for a column of times of two kinds; it names a row of each."""
    log = read_log(engine, config, location, lines=True)
    log = log.filter(log.given.notnull()).mutate(one=which(log.given))
    rows = [engine.rows(log.filter(part).order_by("line").limit(1))[0] for part in (log.one, ~log.one)]
    examples = " and ".join(f"{row['given']!r} in data row {row['line']}" for row in rows)
    problem = f"{display_name(location)}: prepare.interactions.time {config.time!r} mixes {what}: {examples}"
    return UserError(problem, remedy)


def missing_order_error(engine: PrepareEngine, config: Interactions, location: TableLocation, count: int) -> UserError:
    """Return the error for a log whose rows lack a valid time or position; it names the first such row.

    Args:
        engine: engine that reads.
        config: the section `prepare.interactions`.
        location: the log.
        count: number of such rows.
    """
    log = steps.drop_missing_ids(read_log(engine, config, location, lines=True))
    row = engine.rows(log.filter(log.order.isnull()).order_by("line").limit(1))[0]
    role, name = ("time", config.time) if config.time is not None else ("position", config.position)
    what = f"is {row['given']!r}" if row["given"] is not None else "is missing"
    wanted = "epoch seconds or milliseconds, or ISO 8601, from 1900 to 2200," if role == "time" else "a number"
    where = f"{display_name(location)}, data row {row['line']} (user {row['user']!r}, item {row['item']!r})"
    return UserError(
        f"{where}: {name} {what}; {count} such rows",
        f"prepare.interactions.{role} needs {wanted} in every row: correct or remove these rows",
    )


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
        _raise_if_fractional(engine, column, name, field)
    text = columns.as_text(column)
    numbers = kind.is_numeric() or role in read.untyped
    if numbers and compute_value(engine, columns.all_canonical_integers(text)):
        return text.cast("int64")
    return text


def _raise_if_fractional(engine: PrepareEngine, column: ir.FloatingColumn, name: str, field: str) -> None:
    number = column.cast("float64")
    infinite = number.cast("string").lower().contains("inf")
    present = columns.is_finite(number) | infinite  # NaN is a missing value, as in pandas
    bad = compute_value(engine, (present & ~columns.is_integer(number)).sum())
    if bad:
        problem = f"{name}: {field}: the column holds floats, {bad} of them not integers up to 2**53"
        raise UserError(problem, "write ids as integers of up to 18 digits, or as text, in quotes in JSON")


def _empty_table_error(name: str) -> UserError:
    return UserError(f"{name} has a header but no rows", "provide a table with at least one row")


def id_range(engine: PrepareEngine, ids: ir.Column) -> dict[str, Any]:
    """Return the smallest and the largest id, for messages."""
    text = ids.cast("string")
    return engine.rows(text.name("id").as_table().agg(least=ibis._.id.min(), greatest=ibis._.id.max()))[0]
