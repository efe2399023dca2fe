"""The steps of the preparation as Ibis expressions: tables in, a table out, the same on every engine.

Tables and their columns:

- raw log: `user`, `item` (int64 or text), `given` (time or position as in the file), `order` (float64: seconds or the
  position; null where `given` is invalid)
- catalogue: `line`, `item` (int64 or text), `title`, `text`
- numbering of users and of items: `id`, `code` (from 0, in the order of the ids), `hash`
- log: `user`, `item` (codes), `order`, `tie`
- sequences: `user_row`, `item_row`, `order`, `position` (from 0 in the user's order)

After numbering no column is text, and every `order_by` ends in a key without ties, so that engines agree.
"""

from typing import Literal

import ibis
import ibis.expr.types as ir

from rarec.data.preparation.columns import HASH_RANGE, text_hash

PRIME = 2**31 - 1
TIE_RULE = (
    "a user's interactions stand in the order of time (or position); those at the same time by (U + 1)(I + 1) mod "
    "2147483647, where U and I are the first seven hex digits of the md5 of the user's and the item's id, and then by "
    "the item's id: the order of the rows in the file does not matter, and that of the ids does not show"
)
"""Our own rule. Its text is part of every manifest: a change would change the bytes of prepared datasets.

Log files are often sorted by item id, and ids by age or category: either order among ties would be a pattern that a
sequence model learns and that no user followed (half of MovieLens-100K's steps are ties).
"""

Column = Literal["user", "item"]


def drop_missing_ids(log: ir.Table) -> ir.Table:
    """Drop rows of the raw log without a user or an item."""
    return log.filter(log.user.notnull(), log["item"].notnull())


def first_row_per_item(catalogue: ir.Table) -> ir.Table:
    """Keep the first row of each item id."""
    place = ibis.row_number().over(ibis.window(group_by=catalogue["item"], order_by=catalogue.line))
    return catalogue.mutate(place=place).filter(ibis._.place == 0).drop("place")


def number_ids(ids: ir.Column) -> ir.Table:
    """Assign a code and a hash to each distinct id; codes follow the order of the ids (text by code point)."""
    distinct = ids.name("id").as_table().distinct().filter(ibis._.id.notnull())
    code = ibis.row_number().over(ibis.window(order_by=distinct.id)).cast("int32")
    return distinct.mutate(code=code, hash=text_hash(distinct.id.cast("string")))


def encode_ids(log: ir.Table, users: ir.Table, items: ir.Table) -> ir.Table:
    """Replace ids by codes, and drop rows whose user or item has no code.

    Args:
        log: raw log.
        users: numbering of the users.
        items: numbering of the catalogue's items.
    """
    key = log["item"]
    if key.type() != items.id.type():  # one of them is text
        key, items = key.cast("string"), items.mutate(id=items.id.cast("string"))
    users = users.select(user_id="id", user_code="code", user_hash="hash")
    items = items.select(item_id="id", item_code="code", item_hash="hash")
    log = log.select("user", "order", key=key)
    joined = log.inner_join(users, log.user == users.user_id).inner_join(items, log.key == items.item_id)
    user, item = (column.cast("int64") + 1 for column in (joined.user_hash, joined.item_hash))
    tie = (user * item) % PRIME
    return joined.select("order", user=joined.user_code, item=joined.item_code, tie=tie.cast("int32"))


def drop_duplicates(log: ir.Table) -> ir.Table:
    """Keep one row per user, item and time."""
    return log.distinct()


def drop_repeats(log: ir.Table, keep: Literal["first", "last", "runs"]) -> ir.Table:
    """Keep one row per user and item (the first or last), or, with `runs`, the first of consecutive equal items."""
    if keep == "runs":
        before = log["item"].lag().over(ibis.window(group_by=log.user, order_by=user_order(log)))
        marked = log.mutate(before=before)
        return marked.filter(marked.before.isnull() | (marked.before != marked["item"])).drop("before")
    order = log.order.min() if keep == "first" else log.order.max()
    return log.group_by("user", "item", "tie").agg(order=order)


def hold_back_new_items(log: ir.Table, items: ir.Table, share: float) -> ir.Table:
    """Hold back a share of the items, chosen by a hash of their ids: keep them only as a user's last interaction.

    Args:
        log: log in codes.
        items: numbering of the catalogue's items.
        share: share of the items, approximately.
    """
    # a hash of its own: the hash of the ids already orders ties
    new = items.filter(text_hash("new item " + items.id.cast("string")) < share * HASH_RANGE).select(item="code")
    newest_first = [column.desc() for column in user_order(log)]
    age = ibis.row_number().over(ibis.window(group_by=log.user, order_by=newest_first))
    aged = log.mutate(age=age)
    return aged.filter(aged.age == 0).union(aged.filter(aged.age > 0).anti_join(new, "item")).drop("age")


def below_minimum(log: ir.Table, column: Column, fewest: int) -> ir.Table:
    """Return the users (or items) with fewer rows than `fewest`."""
    counts = log.group_by(column).agg(rows=log.count())
    return counts.filter(counts.rows < fewest).select(column)


def drop_ids(log: ir.Table, dropped: ir.Table, column: Column) -> ir.Table:
    """Drop the rows of these users (or items)."""
    return log.anti_join(dropped, column)


def user_order(log: ir.Table) -> list[ir.Column]:
    """Return the sort keys of a user's interactions (`TIE_RULE`); rows that still tie are identical."""
    return [log.order, log.tie, log["item"]]


def dense_rows(numbering: ir.Table, codes: ir.Column) -> ir.Table:
    """Return the ids whose codes occur, with dense rows from 0 in the order of the ids: `id`, `code`, `row`."""
    met = codes.name("code").as_table().distinct()
    kept = numbering.semi_join(met, "code")
    row = ibis.row_number().over(ibis.window(order_by=kept.code)).cast("int32")
    return kept.select("id", "code", row=row)


def build_sequences(log: ir.Table, users: ir.Table, items: ir.Table) -> ir.Table:
    """Return every interaction as row numbers, with its position in the user's sequence."""
    position = ibis.row_number().over(ibis.window(group_by=log.user, order_by=user_order(log))).cast("int32")
    placed = log.select("user", "item", "order", position=position)
    users = users.select(user="code", user_row="row")
    items = items.select(item="code", item_row="row")
    joined = placed.inner_join(users, "user").inner_join(items, "item")
    return joined.select("user_row", "item_row", "order", "position")


def users_table(users: ir.Table) -> ir.Table:
    """Return the written users; `start` is a user's first interaction, `cold` users have no training sample."""
    until = users.length.cumsum(order_by=users.row)
    columns = ("row", "user_id", "start", "length", "train_length", "validation", "test", "cold")
    placed = users.mutate(user_id=users.id, start=until - users.length, cold=users.train_length < 2)
    return placed.select(*columns).order_by("row")


def items_table(items: ir.Table, catalogue: ir.Table, counts: ir.Table) -> ir.Table:
    """Return the written items; `cold` items do not occur in training.

    Args:
        items: columns `id` and `row`.
        catalogue: titles and texts.
        counts: `train_count` of each `item_row` that occurs in training.
    """
    titles = catalogue.select(id="item", title="title", text="text")
    joined = items.select("id", "row").inner_join(titles, "id").left_join(counts, ibis._.row == counts.item_row)
    joined = joined.mutate(item_id=joined.id, train_count=joined.train_count.fill_null(0))
    columns = joined.mutate(cold=joined.train_count == 0)
    return columns.select("row", "item_id", "title", "text", "train_count", "cold").order_by("row")


def interactions_table(sequences: ir.Table, order: str) -> ir.Table:
    """Return the written interactions."""
    return sequences.order_by("user_row", "position").select("user_row", "item_row", **{order: sequences.order})
