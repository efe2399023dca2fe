"""Columns of logs as the steps want them: ids, numbers, times and clean text, from whatever a file holds.

Written so that engines cannot differ: what a text means is decided by the patterns here, never by an engine's own cast.
"""

import ibis
import ibis.expr.types as ir

CANONICAL = "^(0|-?[1-9][0-9]{0,17})$"
"""An integer in its one spelling, within int64."""
NUMBER = r"^[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?$"
ISO = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]+)?)?"
    r" ?(Z|[+-](0[0-9]|1[0-4])(:?[0-5][0-9])?)?)?$"
)
"""ISO 8601: a date, or a date and a time to the minute or finer, in UTC or with its offset."""
WHOLE = 1e15
"""Floats below are exact integers when they have no fraction."""

UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (float("inf"), 1e9))
"""Largest magnitude of a column of epoch times, and what divides it: seconds, milliseconds, micro-, nanoseconds."""


def as_text(column: ir.Column) -> ir.StringColumn:
    """An id as text; a whole float is written as the integer it stands for; null where there is none."""
    kind = column.type()
    if kind.is_string():
        return column.nullif("")
    if kind.is_floating() or (kind.is_decimal() and kind.scale):
        number = column.cast("float64")
        whole = (number == number.floor()) & (number.abs() < WHOLE)
        text = whole.ifelse(number.cast("int64").cast("string"), number.cast("string"))
        return number.isnan().ifelse(ibis.null("string"), text)
    return column.cast("string")


def canonical(text: ir.StringColumn) -> ir.BooleanScalar:
    """Whether every value is a canonical integer (`7`, `-3`; not `007`, `+7` or `7.0`): if not, all stay text."""
    return text.re_search(CANONICAL).all()


def as_number(column: ir.Column) -> ir.FloatingColumn:
    """The column as float64; null where it is no finite number."""
    if column.type().is_string():
        column = column.re_search(NUMBER).ifelse(column, ibis.null("string"))
    number = column.cast("float64")
    finite = ~(number.isnan() | number.isinf())
    return finite.ifelse(number, ibis.null("float64"))


def as_seconds(column: ir.Column, divisor: float) -> ir.FloatingColumn:
    """Epoch seconds of a column of times.

    Args:
        column: numbers, divided by `divisor`; text of numbers or ISO 8601; timestamps or dates (UTC unless zoned).
        divisor: from `UNITS`.
    """
    kind = column.type()
    if kind.is_timestamp() or kind.is_date():
        moment = (column.cast("timestamp('UTC')") if kind.is_timestamp() and kind.timezone else column).cast(
            "timestamp"
        )
        return moment.truncate("s").epoch_seconds().cast("float64") + moment.microsecond().cast("float64") / 1e6
    seconds = as_number(column) / divisor
    return ibis.coalesce(seconds, _iso_seconds(column)) if kind.is_string() else seconds


def _iso_seconds(text: ir.StringColumn) -> ir.FloatingColumn:
    """Epoch seconds of ISO 8601 text, read by its digits; null for anything else, and for days that never were."""
    iso = text.re_search(ISO).ifelse(text, ibis.null("string"))
    day = iso.left(10).try_cast("date").cast("timestamp").epoch_seconds().cast("float64")
    hours, minutes = (_part(iso, pattern) for pattern in ("^.{10}[T ]([0-9]{2})", "^.{10}[T ][0-9]{2}:([0-9]{2})"))
    seconds = _part(iso, "^.{10}[T ][0-9]{2}:[0-9]{2}:([0-9]{2}([.][0-9]+)?)")
    ahead = _part(iso, "^.{13}.*[+]([0-9]{2})") - _part(iso, "^.{13}.*-([0-9]{2})")
    minutes_ahead = _part(iso, "^.{13}.*[+][0-9]{2}:?([0-9]{2})$") - _part(iso, "^.{13}.*-[0-9]{2}:?([0-9]{2})$")
    return day + (hours - ahead) * 3600.0 + (minutes - minutes_ahead) * 60.0 + seconds


def _part(text: ir.StringColumn, pattern: str) -> ir.FloatingColumn:
    """The first group of a pattern as a number; 0 where the text has no such part."""
    return ibis.coalesce(text.re_extract(pattern, 1).nullif("").cast("float64"), 0.0)


def clean_text(column: ir.Column) -> ir.StringColumn:
    """Runs of white space become one space, none at the ends; null where nothing is left."""
    return column.cast("string").re_replace(r"[ \t\n\r\f\v]+", " ").strip().nullif("")


def hashed(text: ir.StringColumn) -> ir.IntegerColumn:
    """A number below 2**28 that any engine gives alike: the first seven hex digits of the text's md5."""
    digest, digits = text.hexdigest("md5"), ibis.literal("0123456789abcdef")
    return sum((digits.find(digest.substr(at, 1)).cast("int64") * 16 ** (6 - at) for at in range(7)), ibis.literal(0))
