"""Which interactions train, validate and test, as Ibis expressions over the users' sequences.

A user's sequence has positions 0 .. length-1. The first `train_length` of them train: position t >= 1 is a training
sample (history 0 .. t-1, target t). `validation` and `test` are the positions of the user's targets, or -1.
"""

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir

from rarec.data.preparation.columns import text_hash

NO_TARGET = -1
MIN_INTERACTIONS = 3
"""Interactions of a user that a leave-one-out split needs; of fewer, all train."""


def leave_one_out(sequences: ir.Table, validating: int | None = None) -> ir.Table:
    """The last interaction tests and the one before it validates; fewer than three all train (Kang & McAuley 2018).

    Args:
        sequences: of all users.
        validating: how many users validate, chosen by a hash of their rows; of the others the interaction before the
            last trains. All by default.

    Returns:
        One row a user: `row`, `length`, `train_length`, `validation`, `test`.
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
    """Two global cuts in time: before the first trains, from the second on tests, between them validates.

    A user's target in a window is the first interaction in it that has an earlier one; what else lies there is context
    only. So no training interaction is at or after the first cut, whoever's it is.

    Args:
        sequences: of all users.
        cuts: in seconds, as `cut_times` finds them.

    Returns:
        As `leave_one_out`.
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
    """Where time must be cut to have about that many interactions before the cut, and never more.

    Interactions at the same time stay on the same side, so a cut is the time of the interaction with that place.

    Returns:
        One row: `cut_0`, `cut_1`, ...
    """
    moments = sequences.group_by("order").agg(rows=sequences.count())
    moments = moments.mutate(until=moments.rows.cumsum(order_by=moments.order))
    cuts = {f"cut_{index}": moments.order.min(where=moments.until > count) for index, count in enumerate(before)}
    return moments.agg(**cuts)


def train_counts(sequences: ir.Table, users: ir.Table) -> ir.Table:
    """How often each item was met in training: `item_row`, `train_count`; items that never were have no row."""
    joined = sequences.inner_join(users, sequences.user_row == users.row)
    training = joined.filter(joined.position < joined.train_length)
    return training.group_by("item_row").agg(train_count=training.count())


def part_sizes(users: ir.Table) -> ir.Table:
    """One row: `training_samples`, `validation_users`, `test_users`."""
    return users.agg(
        training_samples=ibis.greatest(users.train_length - 1, 0).sum(),
        validation_users=users.count(where=users.validation >= 0),
        test_users=users.count(where=users.test >= 0),
    )
