"""Split interactions into training, validation and test, as Ibis expressions over the users' sequences.

A user's sequence has positions 0 to length-1. The first `train_length` of them train: position t >= 1 is a training
sample (history 0 to t-1, target t). `validation` and `test` are the positions of the user's targets, or -1.
"""

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir

from rarec.data.preparation.columns import text_hash

NO_TARGET = -1
MIN_INTERACTIONS = 3
"""Smallest number of interactions that leave-one-out splits; shorter sequences are training only."""


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
