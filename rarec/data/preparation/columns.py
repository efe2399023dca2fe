r"""Convert log columns to ids, numbers, times and clean text, from any column type.

All engines return the same values: text is parsed by the patterns below, never by an engine's own cast, and numbers are
formatted by rules defined here. Patterns end in `\z`, because in Java `$` also matches before a final newline.
"""

import ibis
import ibis.expr.types as ir

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


HASH_RANGE = 16**7
"""Number of distinct hash values."""


def text_hash(text: ir.StringColumn) -> ir.IntegerColumn:
    """Return the first seven hex digits of the md5 of a text as an integer, the same on every engine."""
    digest, digits = text.hexdigest("md5"), ibis.literal("0123456789abcdef")
    values = (digits.find(digest.substr(place, 1)).cast("int64") * 16 ** (6 - place) for place in range(7))
    return sum(values, ibis.literal(0))
