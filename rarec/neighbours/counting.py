"""Neighbour tables that are counted from the training interactions: Ibis expressions, the same rows on every engine.

Tables and their columns:

- training log: `user`, `item`, `position` (from 0 in the user's order); rows are training interactions only
- neighbour table: `item_row`, `neighbour_row`, `score` (float32, above 0); for each item its best M, without itself

Counts are whole numbers, and each score is one expression of counts, so that engines agree to the last bit.
"""

import ibis
import ibis.expr.types as ir


def training_log(interactions: ir.Table, users: ir.Table, newest: int, holdout: float = 0.0) -> ir.Table:
    """Return each user's newest training interactions.

    Args:
        interactions: `line` (from 1, in the order of the file), `user_row`, `item_row`.
        users: `row`, `start`, `train_length`.
        newest: largest number for each user: it bounds the pairs that a user adds.
        holdout: leave out the newest interactions that make up this share, as `PreparedDataset.holding_out` does.
    """
    if holdout:
        wanted = (users.train_length.cast("float64") * holdout).floor().cast("int64")
        held = ibis.least(ibis.greatest(wanted, 1), ibis.greatest(users.train_length - 1, 0))
        users = users.mutate(train_length=users.train_length - held)
    log = interactions.inner_join(users, interactions.user_row == users.row)
    log = log.mutate(position=log.line - 1 - log.start)
    kept = log.filter(log.position < log.train_length, log.position >= log.train_length - newest)
    return kept.select(user="user_row", item="item_row", position="position")


def cooccurrence(log: ir.Table, top: int, shrinkage: float) -> ir.Table:
    """Return item-kNN: the cosine of two items' users, with a shrinkage that holds rare items back.

    The score is `both / (sqrt(users of one * users of the other) + shrinkage)`; see Deshpande & Karypis (2004).

    Args:
        log: training log.
        top: M, the number of neighbours kept for each item.
        shrinkage: number of users.
    """
    met = log.select("user", "item").distinct()
    users = met.group_by("item").agg(users=met.count())
    other = met.select(user="user", neighbour="item")
    pairs = met.inner_join(other, "user").filter(ibis._["item"] != ibis._.neighbour)
    counted = pairs.group_by("item", "neighbour").agg(both=pairs.count())
    counted = counted.inner_join(users, "item")
    counted = counted.inner_join(users.select(neighbour="item", others="users"), "neighbour")
    size = (counted.users.cast("float64") * counted.others.cast("float64")).sqrt() + shrinkage
    return best(counted.select("item", "neighbour", score=counted.both.cast("float64") / size), top)


def transition(log: ir.Table, top: int, steps: int, decay: float, shrinkage: float) -> ir.Table:
    """Return directed neighbours: what follows an item within a few steps, nearer steps counting more.

    The score is the decayed number of transitions, over the root of the product of the two items' interactions.

    Args:
        log: training log.
        top: M, the number of neighbours kept for each item.
        steps: largest distance of two interactions.
        decay: factor for each further step.
        shrinkage: number of interactions.
    """
    sizes = log.group_by("item").agg(rows=log.count())
    later = [
        log.select(user="user", neighbour="item", position=log.position - step, gap=ibis.literal(step))
        for step in range(1, steps + 1)
    ]
    pairs = log.inner_join(ibis.union(*later), ["user", "position"]).filter(ibis._["item"] != ibis._.neighbour)
    counts = {f"at_{step}": (pairs.gap == step).sum() for step in range(1, steps + 1)}
    counted = pairs.group_by("item", "neighbour").agg(**counts)
    weight = counted.at_1.cast("float64")
    for step in range(2, steps + 1):
        weight = weight + counted[f"at_{step}"].cast("float64") * decay ** (step - 1)
    counted = counted.mutate(weight=weight).inner_join(sizes, "item")
    counted = counted.inner_join(sizes.select(neighbour="item", others="rows"), "neighbour")
    size = (counted["rows"].cast("float64") * counted.others.cast("float64")).sqrt() + shrinkage
    return best(counted.select("item", "neighbour", score=counted.weight / size), top)


def best(pairs: ir.Table, top: int) -> ir.Table:
    """Return the best neighbours of each item as a neighbour table; equal scores go to the smaller row."""
    order = ibis.window(group_by=pairs["item"], order_by=[pairs.score.desc(), pairs.neighbour])
    kept = pairs.mutate(place=ibis.row_number().over(order)).filter(ibis._.place < top)
    kept = kept.order_by("item", "place")
    return kept.select(item_row="item", neighbour_row="neighbour", score=kept.score.cast("float32"))
