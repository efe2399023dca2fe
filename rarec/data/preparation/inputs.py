r"""Read the two inputs of a preparation, the log and the catalogue, in the form that the steps need.

Columns of any type become ids, numbers, times and clean text. All engines return the same values: text is parsed by the
patterns below, never by an engine's own cast, and numbers are formatted by rules defined here. Patterns end in `\z`,
because in Java `$` also matches before a final newline.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ibis
import ibis.expr.types as ir

from rarec.config.schema import Interactions, Items, Prepare, Table
from rarec.data.engines import PrepareEngine, compute_value
from rarec.data.engines.table_files import DELIMITED, NAMED, TableLocation, find_files, hash_files
from rarec.data.preparation import steps
from rarec.errors import UserError, redacted_setting
from rarec.storage.artefacts import sha256_json

CANONICAL_INTEGER = r"^(0|-?[1-9][0-9]{0,18})\z"
"""An integer in its only spelling; whether it fits in int64 is checked separately."""
NUMBER = r"^[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?\z"
ISO = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]+)?)?"
    r" ?(Z|[+-](0[0-9]|1[0-4])(:?[0-5][0-9])?)?)?\z"
)
"""ISO 8601: a date, or a date and time to the minute or finer, in UTC or with an offset."""
MAX_EXACT = 2.0**53
"""Floats without a fraction are exact integers up to this value."""

UNITS = {"s": (1.0, 1e11), "ms": (1e3, 1e14), "us": (1e6, 1e17), "ns": (1e9, float("inf"))}
"""Units of epoch times: their number in a second, and a bound. Where the unit is not given, all magnitudes of a column
lie between the bound of the unit before and its own."""
EARLIEST, LATEST = -2_208_988_800.0, 7_258_118_400.0
"""Epoch seconds of 1900 and 2200, which bound all times. Others, such as 0001-01-01, stand for a missing time."""


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
            hashes[name] = sha256_json([redacted_setting(config.engine), location.name])
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
    further = [clean_text(read[role]) for role in texts]
    table = read.select(
        "line",
        item=_id_column(engine, read["item"], location, "item"),
        given=clean_text(read.title),
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
    """Read the interactions as a raw log (see `steps`).

    Args:
        engine: engine that reads.
        config: the section `prepare.interactions`.
        location: the table.
        lines: number the rows of a database's table too.

    Raises:
        UserError: the table has no rows; or see `PrepareEngine.read`.
    """
    lines = lines or location.format != NAMED
    role, name = _order_column(config)
    read = engine.read(location, {"user": config.user, "item": config.item, role: name}, lines=lines)
    given = read[role]
    known = _describe_order(engine, read, given)
    _check_not_empty(known["rows"], location)
    if role == "time" or given.type().is_temporal():
        order = _seconds(config, given, known)
    else:
        order = as_number(given)
        if known["largest"] > MAX_EXACT:
            problem = f"{location.name}: {location.field('position')} {name!r} holds numbers above 2**53"
            raise UserError(f"{problem}, which lose their order", "use ranks within the user, or a time column")
    ids = {role: _id_column(engine, read[role], location, role) for role in ("user", "item")}
    kept = ["line"] if lines else []
    return read.select(*kept, **ids, given=given.cast("string"), order=order)


def _describe_order(engine: PrepareEngine, table: ir.Table, given: ir.Column) -> dict[str, Any]:
    """Count the rows, and the numbers and dates in the column that orders them; find the largest magnitude."""
    counted = {"rows": table.count(), "given": given.count()}
    if not given.type().is_temporal():
        number = as_number(given)
        counted |= {"numbers": number.count(), "largest": number.abs().max()}
    known = engine.rows(table.agg(**counted))[0]
    mixed = given.type().is_string() and 0 < known["numbers"] < known["given"]
    known["dates"] = compute_value(engine, iso_seconds(given).count()) if mixed else 0
    return {**known, "largest": known.get("largest") or 0.0}


def _seconds(config: Interactions, given: ir.Column, known: Mapping[str, Any]) -> ir.FloatingColumn:
    """Convert times to epoch seconds; null where one is invalid, or is of another kind or unit than the others.

    Where the unit is not given, it is that of the largest number. Numbers beside dates are invalid.
    """
    unit: str = config.time_unit
    least = 0.0
    if unit == "auto":
        unit = next(unit for unit, (_, bound) in UNITS.items() if known["largest"] < bound)
        least = max((bound for _, bound in UNITS.values() if bound <= known["largest"]), default=0.0)
    order = as_seconds(given, UNITS[unit][0])
    if given.type().is_temporal():
        return order
    number = as_number(given)
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
    numbered = log if "line" in log.columns else steps.drop_missing_ids(read_log(engine, config, location, lines=True))
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


def use_same_ids(engine: PrepareEngine, log: ir.Table, catalogue: ir.Table) -> str:
    """Return the remedy where no item of a log is in the catalogue: the smallest and the largest id of both."""
    ranges = []
    for table in (log, catalogue):
        ids = table["item"].cast("string").name("id").as_table()
        row = engine.rows(ids.agg(least=ibis._.id.min(), greatest=ibis._.id.max()))[0]
        ranges.append(f"{row['least']!r} to {row['greatest']!r}")
    return f"check that both use the same ids: the log has {ranges[0]}, the catalogue {ranges[1]}"


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
    text = as_text(column)
    numbers = kind.is_numeric() or location.format in DELIMITED  # which have text only
    if numbers and compute_value(engine, all_canonical_integers(text)):
        return text.cast("int64")
    return text


def _check_whole(engine: PrepareEngine, column: ir.FloatingColumn, name: str) -> None:
    number = column.cast("float64")
    infinite = number.cast("string").lower().contains("inf")
    present = is_finite(number) | infinite  # NaN is a missing value, as in pandas
    fractional = compute_value(engine, (present & ~is_integer(number)).sum())
    if fractional:
        problem = f"{name}: the column holds floats, {fractional} of them not integers up to 2**53"
        raise UserError(problem, "write ids as integers of up to 18 digits, or as text, in quotes in JSON")


# ---- values of any type


def is_finite(number: ir.FloatingColumn) -> ir.BooleanColumn:
    """Return True where a float is neither NaN nor infinite.

    Computed by arithmetic: over Parquet, DuckDB simplifies `isnan` and comparisons with statistics that ignore NaN, and
    Ibis returns False for `isinf` on Spark.
    """
    return number * 0 == 0


def is_integer(number: ir.FloatingColumn) -> ir.BooleanColumn:
    """Return True where a float equals an integer exactly."""
    return is_finite(number) & (number.abs() < MAX_EXACT) & (number % 1 == 0)


def as_text(column: ir.Column) -> ir.StringColumn:
    """Convert values to text; missing values are null.

    A whole float is written as an integer, any other with up to six decimals; one beyond 2**53 becomes null.
    """
    kind = column.type()
    if kind.is_string():
        return column.nullif("")
    if kind.is_decimal():
        return column.cast("string").re_replace(r"[.]0+\z", "")
    if kind.is_floating():
        number = column.cast("float64")
        integer = is_integer(number).ifelse(number, 0.0).cast("int64").cast("string")
        near = (is_finite(number) & (number.abs() < MAX_EXACT)).ifelse(number, ibis.null("float64"))
        decimals = near.cast("decimal(38, 6)").cast("string").re_replace(r"[.]?0+\z", "")
        return is_integer(number).ifelse(integer, decimals)
    return column.cast("string")


def all_canonical_integers(text: ir.StringColumn) -> ir.BooleanScalar:
    """Return True if every value is a canonical integer (`7`, `-3`; not `007`, `+7` or `7.0`) or null."""
    integer = text.re_search(CANONICAL_INTEGER) & text.try_cast("int64").notnull()
    return (text.isnull() | integer).all()


def as_number(column: ir.Column) -> ir.FloatingColumn:
    """Convert a column to float64; null where it is not a finite number."""
    if column.type().is_string():
        column = column.re_search(NUMBER).ifelse(column, ibis.null("string"))
    number = column.cast("float64")
    return is_finite(number).ifelse((number == 0).ifelse(0.0, number), ibis.null("float64"))  # -0 is 0


def as_seconds(column: ir.Column, divisor: float) -> ir.FloatingColumn:
    """Convert a column of times to epoch seconds; null where it is no time between `EARLIEST` and `LATEST`.

    Numbers count from 1970 and are not negative: -1 stands for a missing time.

    Args:
        column: numbers, divided by `divisor`; text with numbers or ISO 8601; timestamps or dates (UTC unless zoned).
        divisor: number of its units in a second, from `UNITS`.
    """
    kind = column.type()
    if kind.is_timestamp() or kind.is_date():
        zoned = kind.is_timestamp() and kind.timezone
        moment = (column.cast("timestamp('UTC')") if zoned else column).cast("timestamp")
        seconds = moment.truncate("s").epoch_seconds().cast("float64") + moment.strftime("%f").cast("float64") / 1e6
    else:
        number = as_number(column) / divisor
        seconds = (number >= 0).ifelse(number, ibis.null("float64"))
        seconds = ibis.coalesce(seconds, iso_seconds(column)) if kind.is_string() else seconds
    return seconds.between(EARLIEST, LATEST).ifelse(seconds, ibis.null("float64"))


def iso_seconds(text: ir.StringColumn) -> ir.FloatingColumn:
    """Parse ISO 8601 text into epoch seconds by its digits; null for anything else and for dates that do not exist."""
    iso = text.re_search(ISO).ifelse(text, ibis.null("string"))
    day = iso.left(10).try_cast("date").cast("timestamp").epoch_seconds().cast("float64")
    hours, minutes = (_part(iso, pattern) for pattern in ("^.{10}[T ]([0-9]{2})", "^.{10}[T ][0-9]{2}:([0-9]{2})"))
    seconds = _part(iso, "^.{10}[T ][0-9]{2}:[0-9]{2}:([0-9]{2}([.][0-9]+)?)")
    ahead = _part(iso, "^.{13}.*[+]([0-9]{2})") - _part(iso, "^.{13}.*-([0-9]{2})")
    minutes_ahead = _part(iso, r"^.{13}.*[+][0-9]{2}:?([0-9]{2})\z") - _part(iso, r"^.{13}.*-[0-9]{2}:?([0-9]{2})\z")
    return day + (hours - ahead) * 3600.0 + (minutes - minutes_ahead) * 60.0 + seconds


def _part(text: ir.StringColumn, pattern: str) -> ir.FloatingColumn:
    """Return the first group of a pattern as a number; 0 where the text does not match."""
    return ibis.coalesce(text.re_extract(pattern, 1).nullif("").cast("float64"), 0.0)


def clean_text(column: ir.Column) -> ir.StringColumn:
    """Collapse runs of white space to one space and strip the ends; null where nothing is left."""
    return as_text(column).re_replace(r"[ \t\n\r\f\x0B]+", " ").strip().nullif("")
