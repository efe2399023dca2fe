"""The steps of the preparation as Ibis expressions: tables in, a table out, the same on every engine.

Tables and their columns:

- raw log: `user`, `item` (int64 or text), `given` (time or position as in the file), `order` (float64: seconds or the
  position; null where `given` is invalid), and of files `line` (number of the row, from 1)
- catalogue: `line`, `item` (int64 or text), `title`, `text`
- numbering of users and of items: `id`, `code` (from 0, in the order of the ids)
- log: `user`, `item` (codes), `order`, `tie` (which orders interactions of one time)
- sequences: `user_row`, `item_row`, `order`, `position` (from 0 in the user's order)
- split: `row`, `length`, `train_length`, `validation`, `test`, one row per user. The first `train_length` interactions
  train: position t >= 1 is a training sample (history 0 to t-1, target t). `validation` and `test` are the positions of
  the user's targets, or -1

After numbering no column is text, and every `order_by` ends in a key without ties, so that engines agree.
"""

from collections.abc import Sequence
from typing import Literal

import ibis
import ibis.expr.types as ir

PRIME = 2**31 - 1
TIE_RULE = (
    "a user's interactions are in the order of time (or position); those of one time in the order of the log's rows, "
    "and of its files by name. A database's table has no order of rows: there those of one time are ordered by "
    "(U + 1)(I + 1) mod 2147483647, where U and I are the first seven hex digits of the md5 of the user's and the "
    "item's id, and then by the item's id"
)
"""Part of every manifest, since a change changes prepared datasets.

A client that serves users from the same log keeps its order, and so gets the lists of the batch. The hash hides the
order of the ids, which would be a pattern that a sequence model learns and that no user followed.
"""

NO_TARGET = -1
MIN_INTERACTIONS = 3
"""Smallest number of interactions that leave-one-out splits; shorter sequences are training only."""

HASH_RANGE = 16**7
"""Number of distinct hash values."""

Column = Literal["user", "item"]


def text_hash(text: ir.StringColumn) -> ir.IntegerColumn:
    """Return the first seven hex digits of the md5 of a text as an integer, the same on every engine."""
    digest, digits = text.hexdigest("md5"), ibis.literal("0123456789abcdef")
    places = (digits.find(digest.substr(place, 1)).cast("int32") for place in range(7))
    values = (place.cast("int64") * 16 ** (6 - index) for index, place in enumerate(places))  # Spark finds 32 bits
    return sum(values, ibis.literal(0))


def drop_missing_ids(log: ir.Table) -> ir.Table:
    """Drop rows of the raw log without a user or an item."""
    return log.filter(log.user.notnull(), log["item"].notnull())


def first_row_per_item(catalogue: ir.Table) -> ir.Table:
    """Keep the first row of each item id."""
    place = ibis.row_number().over(ibis.window(group_by=catalogue["item"], order_by=catalogue.line))
    return catalogue.mutate(place=place).filter(ibis._.place == 0).drop("place")


def number_ids(ids: ir.Column) -> ir.Table:
    """Assign a code to each distinct id, in the order of the ids (text by code point)."""
    distinct = ids.name("id").as_table().distinct().filter(ibis._.id.notnull())
    return distinct.mutate(code=ibis.row_number().over(ibis.window(order_by=distinct.id)).cast("int32"))


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
    ordered = "line" in log.columns
    users, items = (
        ids.select(
            **{f"{unit}_id": ids.id, f"{unit}_code": ids.code},
            **({} if ordered else {f"{unit}_hash": text_hash(ids.id.cast("string"))}),
        )
        for unit, ids in (("user", users), ("item", items))
    )
    log = log.select("user", "order", *["line"] * ordered, key=key)
    joined = log.inner_join(users, log.user == users.user_id).inner_join(items, log.key == items.item_id)
    tie = joined.line if ordered else (joined.user_hash + 1) * (joined.item_hash + 1) % PRIME
    return joined.select("order", user=joined.user_code, item=joined.item_code, tie=tie)


def drop_duplicates(log: ir.Table) -> ir.Table:
    """Keep the first row per user, item and time."""
    return log.group_by("user", "item", "order").agg(tie=log.tie.min())


def drop_repeats(log: ir.Table, keep: Literal["first", "last", "runs"]) -> ir.Table:
    """Keep one row per user and item (the first or last), or, with `runs`, the first of consecutive equal items.

    Args:
        log: with one row per user, item and time.
        keep: see `prepare.repeats`.
    """
    if keep == "runs":
        before = log["item"].lag().over(ibis.window(group_by=log.user, order_by=user_order(log)))
        marked = log.mutate(before=before)
        return marked.filter(marked.before.isnull() | (marked.before != marked["item"])).drop("before")
    kept = log.group_by("user", "item")
    if keep == "first":
        return kept.agg(order=log.order.min(), tie=log.tie.argmin(log.order))
    return kept.agg(order=log.order.max(), tie=log.tie.argmax(log.order))


def hold_back_new_items(log: ir.Table, items: ir.Table, share: float) -> ir.Table:
    """Hold back a share of the items, chosen by a hash of their ids: keep them only as a user's last interaction.

    Args:
        log: log in codes.
        items: numbering of the catalogue's items.
        share: share of the items, approximately.
    """
    # a hash of its own: that of the ids alone orders ties of a database's table
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


def leave_one_out(sequences: ir.Table, validating: int | None = None) -> ir.Table:
    """Test on the last interaction and validate on the one before it (Kang & McAuley 2018).

    Users with fewer than three interactions are training only.

    Args:
        sequences: sequences of all users.
        validating: number of users that validate, chosen by a hash of their rows; the others train on the interaction
            before the last. All by default.

    Returns:
        One row per user: `row`, `length`, `train_length`, `validation`, `test`.
    """
    users = sequences.group_by(row="user_row").agg(length=sequences.count())
    enough = validates = users.length >= MIN_INTERACTIONS
    if validating is not None:
        users = users.mutate(tested=enough, drawn=text_hash(users.row.cast("string")))
        users = users.mutate(turn=ibis.row_number().over(order_by=[users.tested.desc(), users.drawn, users.row]))
        enough, validates = users.tested, users.tested & (users.turn < validating)
    return users.select(
        "row",
        "length",
        train_length=users.length - enough.cast("int64") - validates.cast("int64"),
        validation=validates.ifelse(users.length - 2, NO_TARGET),
        test=enough.ifelse(users.length - 1, NO_TARGET),
    )


def temporal(sequences: ir.Table, cuts: tuple[float, float]) -> ir.Table:
    """Split at two global times: train before the first, validate between them, test from the second on.

    A user's target in a window is the first interaction there that has an earlier one; the others in the window are
    only context. So no training interaction of any user is at or after the first cut.

    Args:
        sequences: sequences of all users.
        cuts: cut times in seconds, from `cut_times`.

    Returns:
        See `leave_one_out`.
    """
    first, second = cuts
    users = sequences.group_by(row="user_row").agg(
        length=sequences.count(),
        train_length=sequences.count(where=sequences.order < first),
        before_test=sequences.count(where=sequences.order < second),
    )
    validation = ibis.greatest(users.train_length, 1)
    test = ibis.greatest(users.before_test, 1)
    return users.mutate(
        validation=(validation < users.before_test).ifelse(validation, NO_TARGET),
        test=(test < users.length).ifelse(test, NO_TARGET),
    ).drop("before_test")


def cut_times(sequences: ir.Table, before: Sequence[int]) -> ir.Table:
    """Find the times that leave about the given numbers of interactions before them, and never more.

    Interactions at the same time stay on the same side: a cut is the time of the interaction at that position.

    Returns:
        One row: `cut_0`, `cut_1`, ...
    """
    moments = sequences.group_by("order").agg(rows=sequences.count())
    moments = moments.mutate(until=moments.rows.cumsum(order_by=moments.order))
    cuts = {f"cut_{index}": moments.order.min(where=moments.until > count) for index, count in enumerate(before)}
    return moments.agg(**cuts)


def train_counts(sequences: ir.Table, users: ir.Table) -> ir.Table:
    """Count the training interactions of each item: `item_row`, `train_count`; items without any have no row."""
    joined = sequences.inner_join(users, sequences.user_row == users.row)
    training = joined.filter(joined.position < joined.train_length)
    return training.group_by("item_row").agg(train_count=training.count())


def part_sizes(users: ir.Table) -> ir.Table:
    """Count the samples and users of each part; one row: `training_samples`, `validation_users`, `test_users`."""
    return users.agg(
        training_samples=ibis.greatest(users.train_length - 1, 0).sum(),
        validation_users=users.count(where=users.validation >= 0),
        test_users=users.count(where=users.test >= 0),
    )


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
