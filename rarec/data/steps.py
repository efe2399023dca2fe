"""The preparation's steps as Ibis expressions: each takes tables and gives a table, whatever engine runs it.

Tables and their columns:

- log: `line`, `user` (int64 or text), `item` (text), `order` (float64: seconds, or the position)
- catalogue: `line`, `item` (int64 or text), `key` (the item's id as text), `title`, `text`
- sequences: `user_row`, `item_row`, `order`, `position` (from 0 in the user's own order)

Every `order_by` ends in a key that leaves no tie, so that engines cannot differ.
"""

from typing import Literal

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

TIE_RULE = (
    "a user's interactions stand in the order of time (or position); those at the same time by the md5 of "
    "'user<TAB>item', which does not depend on the order of the rows in the file and follows no order of the ids"
)
"""Ours. Log files are often sorted by item id, and so are ids by age or by kind: either order inside a tie would be a
pattern that a sequence model learns and that no user ever followed (half of MovieLens-100K's steps are ties)."""

UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (float("inf"), 1e9))
"""Largest magnitude of a column of epoch times, and what divides it: seconds, milliseconds, micro-, nanoseconds."""


def as_number(column: ir.Column) -> ir.FloatingColumn:
    """The column as float64; null where it is no finite number."""
    number = column.try_cast("float64") if column.type().is_string() else column.cast("float64")
    finite = ~(number.isnan() | number.isinf())
    return finite.ifelse(number, ibis.null("float64"))


def as_seconds(column: ir.Column, divisor: float) -> ir.FloatingColumn:
    """Epoch numbers divided by `divisor`; or ISO 8601 text, to the millisecond, UTC unless it names a zone; or null."""
    seconds = as_number(column) / divisor
    if not column.type().is_string():
        return seconds
    moment = column.try_cast(dt.Timestamp(timezone="UTC")).cast("timestamp")
    iso = moment.truncate("s").epoch_seconds().cast("float64") + moment.millisecond().cast("float64") / 1000.0
    return ibis.coalesce(seconds, iso)


def with_ids(log: ir.Table) -> ir.Table:
    """Rows that name a user and an item."""
    return log.filter(log.user.notnull(), log["item"].notnull())


def in_catalogue(log: ir.Table, catalogue: ir.Table) -> ir.Table:
    """Rows whose item the catalogue holds."""
    return log.semi_join(catalogue, log["item"] == catalogue.key)


def without_repeats(log: ir.Table, keep: Literal["keep_first", "keep_last"]) -> ir.Table:
    """One row for each pair of user and item: the user's first or last."""
    keys = ordering(log)
    keys = keys if keep == "keep_first" else [key.desc() for key in keys]
    place = ibis.row_number().over(ibis.window(group_by=[log.user, log["item"]], order_by=keys))
    return log.mutate(place=place).filter(ibis._.place == 0).drop("place")


def at_least(log: ir.Table, column: Literal["user", "item"], fewest: int) -> ir.Table:
    """Rows whose user (or item) has at least `fewest` rows."""
    count = log.count().over(ibis.window(group_by=log[column]))
    return log.mutate(rows=count).filter(ibis._.rows >= fewest).drop("rows")


def ordering(log: ir.Table) -> list[ir.Column]:
    """The order of a user's interactions (`TIE_RULE`); rows that still tie are the same but for their line."""
    pair = log.user.cast("string") + "\t" + log["item"]
    return [log.order, pair.hexdigest("md5"), log["item"], log.line]


def first_of_each_item(catalogue: ir.Table) -> ir.Table:
    """One row an item id: the first in the file."""
    place = ibis.row_number().over(ibis.window(group_by=catalogue.key, order_by=catalogue.line))
    return catalogue.mutate(place=place).filter(ibis._.place == 0).drop("place")


def clean_text(column: ir.StringColumn) -> ir.StringColumn:
    """Runs of white space become one space, none at the ends; null where nothing is left."""
    return column.re_replace(r"\s+", " ").strip().nullif("")


def numbered(ids: ir.Table, column: str) -> ir.Table:
    """Dense rows from 0, in the order of the ids (numbers as numbers, text by code point), in a column `row`."""
    return ids.mutate(row=ibis.row_number().over(ibis.window(order_by=ids[column])))


def sequences(log: ir.Table, users: ir.Table, items: ir.Table) -> ir.Table:
    """Every interaction by row numbers, with its position in its user's sequence."""
    position = ibis.row_number().over(ibis.window(group_by=log.user, order_by=ordering(log)))
    placed = log.mutate(position=position)
    users = users.select(user="user", user_row="row")
    items = items.select(item="key", item_row="row")
    joined = placed.inner_join(users, "user").inner_join(items, "item")
    return joined.select("user_row", "item_row", "order", "position")


def users_table(users: ir.Table) -> ir.Table:
    """What is written of the users: `start` is where a user's interactions begin."""
    until = users.length.cumsum(order_by=users.row)
    columns = ("row", "user_id", "start", "length", "train_length", "validation", "test")
    return users.mutate(user_id=users.user, start=until - users.length).select(*columns).order_by("row")


def items_table(items: ir.Table, counts: ir.Table) -> ir.Table:
    """What is written of the items: `counts` has a `train_count` for each `item_row` met in training."""
    joined = items.left_join(counts, items.row == counts.item_row)
    columns = joined.mutate(item_id=joined["item"], train_count=joined.train_count.fill_null(0))
    return columns.select("row", "item_id", "title", "text", "train_count").order_by("row")


def interactions_table(sequences: ir.Table, order: str) -> ir.Table:
    """What is written of the interactions."""
    return sequences.order_by("user_row", "position").select("user_row", "item_row", **{order: sequences.order})
