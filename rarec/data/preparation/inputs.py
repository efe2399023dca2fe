"""Read the two inputs of a preparation, the log and the catalogue, in the form that the steps need."""

from collections.abc import Callable, Mapping
from typing import Any

import ibis
import ibis.expr.types as ir

from rarec.config.schema import Interactions, Items, Prepare, Table
from rarec.data.engines import PrepareEngine, compute_value
from rarec.data.engines.table_files import DELIMITED, NAMED, TableLocation, find_files, hash_files
from rarec.data.preparation import columns, steps
from rarec.errors import UserError, without_password
from rarec.storage.artefacts import sha256_json


def table_location(table: Table, section: str) -> TableLocation:
    """Return the location of a table of the configuration.

    Raises:
        UserError: its files do not exist, or are not of one known format.
    """
    return TableLocation(section, table.table) if table.table is not None else find_files(str(table.path), section)


def input_hashes(config: Prepare) -> dict[str, str]:
    """Return the hashes of the log and of the catalogue.

    A database table is identified by its name and engine alone; run with `--fresh` when its rows have changed.

    Raises:
        UserError: the files do not exist.
    """
    hashes = {}
    for name in ("interactions", "items"):
        location = table_location(getattr(config, name), f"prepare.{name}")
        if location.format == NAMED:
            hashes[name] = sha256_json([without_password(config.engine), location.name])
        else:
            hashes[name] = hash_files(location)
    return hashes


def read_catalogue(
    engine: PrepareEngine, config: Items, location: TableLocation, say: Callable[[str], None]
) -> tuple[ir.Table, dict[str, int]]:
    """Read the items; keep the first row of each id, and fill in missing titles.

    Args:
        engine: engine that reads.
        config: the section `prepare.items`.
        location: the table.
        say: print one line to the user.

    Returns:
        The items, one row each: `line`, `item`, `title`, `text`; and the counts of rows that were dropped or changed:
        `rows`, `rows_without_id`, `repeated_ids`, `untitled`.

    Raises:
        UserError: no row has an id; or see `PrepareEngine.read`.
    """
    texts = {f"text_{index}": name for index, name in enumerate(config.text)}
    read = engine.read(location, {"item": config.item, "title": config.title, **texts}, lines=True)
    further = [columns.clean_text(read[role]) for role in texts]
    table = read.select(
        "line",
        item=_id_column(engine, read["item"], location, "item"),
        given=columns.clean_text(read.title),
        text=ibis.literal(", ").join(further).fill_null("") if further else ibis.literal(""),
    )
    ids = table["item"]
    header = table.line.min(where=(ids.cast("string") == config.item) & (table.given == config.title))
    counted = {"rows": table.count(), "rows_without_id": ids.isnull().sum(), "ids": ids.nunique()}
    rows = engine.rows(table.agg(**counted, header=header))[0]
    _check_not_empty(rows["rows"], location)
    repeated = rows.pop("header")
    if repeated is not None:
        problem = f"{location.name}, data row {repeated}: the header again, as where files were joined to one"
        raise UserError(problem, "name the files by a pattern such as items-*.csv, or remove that row")
    if not rows["ids"]:
        problem = f"{location.name}: column {config.item!r} is empty in every row"
        raise UserError(problem, f"set {location.field('item')} to the column of item ids")
    table = steps.first_row_per_item(table.filter(ids.notnull()))
    table = table.mutate(title=table.given.fill_null(config.untitled), untitled=table.given.isnull()).drop("given")
    kept = engine.keep("catalogue", table)
    rows["repeated_ids"] = rows["rows"] - rows["rows_without_id"] - rows.pop("ids")
    rows["untitled"] = compute_value(engine, kept.untitled.sum())
    messages = {
        "rows_without_id": "rows without an item id: dropped",
        "repeated_ids": "rows repeat an item id: only the first row of each id is kept",
        "untitled": f"items have no title: replaced by {config.untitled!r} (prepare.items.untitled)",
    }
    for name, text in messages.items():
        if rows[name]:
            say(f"{location.name}: {rows[name]:,} {text}")
    return kept.drop("untitled"), rows


def read_log(engine: PrepareEngine, config: Interactions, location: TableLocation, *, lines: bool = False) -> ir.Table:
    """Read the interactions as a raw log (see `steps`), with the column `line` if requested.

    Raises:
        UserError: the table has no rows; or see `PrepareEngine.read`.
    """
    role, name = _order_column(config)
    read = engine.read(location, {"user": config.user, "item": config.item, role: name}, lines=lines)
    given = read[role]
    known = _describe_order(engine, read, given)
    _check_not_empty(known["rows"], location)
    if role == "time" or given.type().is_temporal():
        order = _seconds(config, given, known)
    else:
        order = columns.as_number(given)
        if known["largest"] > columns.MAX_EXACT:
            problem = f"{location.name}: {location.field('position')} {name!r} holds numbers above 2**53"
            raise UserError(f"{problem}, which lose their order", "use ranks within the user, or a time column")
    ids = {role: _id_column(engine, read[role], location, role) for role in ("user", "item")}
    kept = ["line"] if lines else []
    return read.select(*kept, **ids, given=given.cast("string"), order=order)


def _describe_order(engine: PrepareEngine, table: ir.Table, given: ir.Column) -> dict[str, Any]:
    """Count the rows, and the numbers and dates in the column that orders them; find the largest magnitude."""
    counted = {"rows": table.count(), "given": given.count()}
    if not given.type().is_temporal():
        number = columns.as_number(given)
        counted |= {"numbers": number.count(), "largest": number.abs().max()}
    known = engine.rows(table.agg(**counted))[0]
    mixed = given.type().is_string() and 0 < known["numbers"] < known["given"]
    known["dates"] = compute_value(engine, columns.iso_seconds(given).count()) if mixed else 0
    return {**known, "largest": known.get("largest") or 0.0}


def _seconds(config: Interactions, given: ir.Column, known: Mapping[str, Any]) -> ir.FloatingColumn:
    """Convert times to epoch seconds; null where one is invalid, or is of another kind or unit than the others.

    Where the unit is not given, it is that of the largest number. Numbers beside dates are invalid.
    """
    unit: str = config.time_unit
    least = 0.0
    if unit == "auto":
        unit = next(unit for unit, (_, bound) in columns.UNITS.items() if known["largest"] < bound)
        least = max((bound for _, bound in columns.UNITS.values() if bound <= known["largest"]), default=0.0)
    order = columns.as_seconds(given, columns.UNITS[unit][0])
    if given.type().is_temporal():
        return order
    number = columns.as_number(given)
    fits = number.isnull() if known["dates"] else number.isnull() | (number.abs() >= least)
    return fits.ifelse(order, ibis.null("float64"))


def check_order(engine: PrepareEngine, config: Interactions, location: TableLocation, log: ir.Table) -> None:
    """Check that every row of a log has a valid time or position.

    Args:
        engine: engine that reads.
        config: the section `prepare.interactions`.
        location: where the log is.
        log: the raw log, without rows that lack an id.

    Raises:
        UserError: a row lacks it; the message names the first such row, and the first that does not.
    """
    count = compute_value(engine, log.order.isnull().sum())
    if not count:
        return
    numbered = steps.drop_missing_ids(read_log(engine, config, location, lines=True))
    invalid, valid = (
        engine.rows(numbered.filter(fits).order_by("line").limit(1))
        for fits in (numbered.order.isnull(), numbered.order.notnull())
    )
    row = invalid[0]
    role, name = _order_column(config)
    field = location.field(role)
    value = "is missing"
    if row["given"] is not None:
        other = (
            f", or of another kind or unit than {valid[0]['given']!r} in data row {valid[0]['line']}" if valid else ""
        )
        value = f"is {row['given']!r}, which is invalid{other}"
    where = f"{location.name}, data row {row['line']} (user {row['user']!r}, item {row['item']!r})"
    wanted = "a number in every row"
    if role == "time":
        wanted = f"ISO 8601 in every row, or numbers of one unit (name it in {field}_unit), from 1900 to 2200"
    raise UserError(
        f"{where}: {name} {value}; {count} such rows", f"{field} needs {wanted}: correct or remove these rows"
    )


def _order_column(config: Interactions) -> tuple[str, str]:
    """Return the role and the name of the column that orders the log."""
    return ("time", config.time) if config.time is not None else ("position", str(config.position))


def _check_not_empty(rows: int, location: TableLocation) -> None:
    if not rows:
        raise UserError(f"{location.name} has a header but no rows", "provide a table with at least one row")


def _id_column(engine: PrepareEngine, column: ir.Column, location: TableLocation, role: str) -> ir.Column:
    """Return a column of ids as int64 if all values are integers, else as text.

    Raises:
        UserError: the ids are floats with a fraction, which engines format differently and which may collide.
    """
    kind = column.type()
    if kind.is_signed_integer():
        return column.cast("int64")
    if kind.is_floating():
        _check_whole(engine, column, f"{location.name}: {location.field(role)}")
    text = columns.as_text(column)
    numbers = kind.is_numeric() or location.format in DELIMITED  # which have text only
    if numbers and compute_value(engine, columns.all_canonical_integers(text)):
        return text.cast("int64")
    return text


def _check_whole(engine: PrepareEngine, column: ir.FloatingColumn, name: str) -> None:
    number = column.cast("float64")
    infinite = number.cast("string").lower().contains("inf")
    present = columns.is_finite(number) | infinite  # NaN is a missing value, as in pandas
    fractional = compute_value(engine, (present & ~columns.is_integer(number)).sum())
    if fractional:
        problem = f"{name}: the column holds floats, {fractional} of them not integers up to 2**53"
        raise UserError(problem, "write ids as integers of up to 18 digits, or as text, in quotes in JSON")
