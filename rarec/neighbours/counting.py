"""Neighbour models that are counted from the training interactions: Ibis expressions, the same rows on every engine.

Tables and their columns:

- training log: `user`, `item`, `position` (from 0 in the user's order); rows are training interactions only
- neighbour table: `item_row`, `neighbour_row`, `score` (float32, above 0); for each item its best M, without itself

Counts are whole numbers, and each score is one expression of counts, so that engines agree to the last bit.
"""

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from scipy import sparse

from rarec.config.neighbours import NeighbourConfig
from rarec.data import tables
from rarec.data.dataset import PreparedDataset
from rarec.neighbours.base import SCHEMA, NeighbourModel

if TYPE_CHECKING:
    import ibis.expr.types as ir

    from rarec.data.engines import PrepareEngine


class CountedModel(NeighbourModel):
    """Base class of models whose table is an expression of the training log."""

    class Config(NeighbourConfig):
        """See `Neighbours`."""

        longest: int
        shrinkage: float

    config: Config

    @abstractmethod
    def expression(self, log: "ir.Table") -> "ir.Table":
        """Return the neighbour table of a training log."""

    def fit(self, dataset: PreparedDataset) -> sparse.csr_matrix:
        """See `NeighbourModel`."""
        table = pa.Table.from_batches(self.rows(dataset)).select(SCHEMA.names)
        items, near, scores = (column.to_numpy().copy() for column in table.columns)
        starts_N = np.searchsorted(items, np.arange(dataset.n_items + 1))
        return sparse.csr_matrix((scores, near, starts_N), (dataset.n_items, dataset.n_items))

    def rows(self, dataset: PreparedDataset) -> Iterator[pa.RecordBatch]:
        """See `NeighbourModel`: the engine counts and sorts, so that memory does not depend on the table."""
        with self.open_engine() as engine:
            log = read_training_log(engine, dataset, self.config.longest)
            yield from engine.batches(self.expression(engine.keep("training_log", log)))


class Cooccurrence(CountedModel):
    """Item-kNN: the cosine of two items' users, with a shrinkage that holds rare items back.

    The score is `both / (sqrt(users of one * users of the other) + shrinkage)`; see Deshpande & Karypis (2004).
    """

    title = "bought together (item-kNN)"

    def expression(self, log: "ir.Table") -> "ir.Table":
        """See `CountedModel`."""
        met = log.select("user", "item").distinct()
        users = met.group_by("item").agg(users=met.count())
        other = met.select(user="user", neighbour="item")
        pairs = met.inner_join(other, "user")
        pairs = pairs.filter(pairs["item"] != pairs.neighbour)
        counted = pairs.group_by("item", "neighbour").agg(both=pairs.count())
        counted = counted.inner_join(users, "item")
        counted = counted.inner_join(users.select(neighbour="item", others="users"), "neighbour")
        size = (counted.users.cast("float64") * counted.others.cast("float64")).sqrt() + self.config.shrinkage
        return best(counted.select("item", "neighbour", score=counted.both.cast("float64") / size), self.config.top)


class Transition(CountedModel):
    """Directed neighbours: what follows an item within a few steps, nearer steps counting more.

    The score is the decayed number of transitions, over the root of the product of the two items' interactions.
    """

    title = "bought next"

    class Config(CountedModel.Config):
        """See `Neighbours`."""

        steps: int
        step_decay: float

    config: Config

    def expression(self, log: "ir.Table") -> "ir.Table":
        """See `CountedModel`."""
        import ibis

        steps = range(1, self.config.steps + 1)
        decay = self.config.step_decay
        sizes = log.group_by("item").agg(rows=log.count())
        later = [
            log.select(user="user", neighbour="item", position=log.position - step, gap=ibis.literal(step))
            for step in steps
        ]
        pairs = log.inner_join(ibis.union(*later), ["user", "position"])
        pairs = pairs.filter(pairs["item"] != pairs.neighbour)
        counts = {f"at_{step}": (pairs.gap == step).sum() for step in steps}
        counted = pairs.group_by("item", "neighbour").agg(**counts)
        weight = counted.at_1.cast("float64")
        for step in steps[1:]:
            weight = weight + counted[f"at_{step}"].cast("float64") * decay ** (step - 1)
        counted = counted.mutate(weight=weight).inner_join(sizes, "item")
        counted = counted.inner_join(sizes.select(neighbour="item", others="rows"), "neighbour")
        size = (counted["rows"].cast("float64") * counted.others.cast("float64")).sqrt() + self.config.shrinkage
        return best(counted.select("item", "neighbour", score=counted.weight / size), self.config.top)


def read_training_log(engine: "PrepareEngine", dataset: PreparedDataset, newest: int) -> "ir.Table":
    """Return each user's newest training interactions from the files of a prepared dataset.

    Args:
        engine: reads them.
        dataset: prepared; where it is `refitted`, its validation interactions are training interactions.
        newest: largest number for each user: it bounds the pairs that a user adds.
    """
    interactions = _read(engine, dataset.directory, tables.INTERACTIONS, ("user_row", "item_row"))
    columns = ("row", "start", "length", "train_length", "validation", "test")
    users = _read(engine, dataset.directory, tables.USERS, columns).drop("line")
    if dataset.refit:
        until = (users.test >= 0).ifelse(users.test, users.length)
        users = users.mutate(train_length=(users.validation >= 0).ifelse(until, users.train_length))
    log = interactions.inner_join(users, interactions.user_row == users.row)
    log = log.mutate(position=log.line - 1 - log.start)
    kept = log.filter(log.position < log.train_length, log.position >= log.train_length - newest)
    return kept.select(user="user_row", item="item_row", position="position")


def _read(engine: "PrepareEngine", directory: Path, file: str, columns: tuple[str, ...]) -> "ir.Table":
    """Read columns of a table, and `line`, the number of each row from 1."""
    from rarec.data.engines.table_files import find_files

    location = find_files(str(directory / file), Path(file).stem)
    return engine.read(location, {name: name for name in columns}, lines=True)


def best(pairs: "ir.Table", top: int) -> "ir.Table":
    """Return the best neighbours of each item as a neighbour table; equal scores go to the smaller row."""
    import ibis

    order = ibis.window(group_by=pairs["item"], order_by=[pairs.score.desc(), pairs.neighbour])
    placed = pairs.mutate(place=ibis.row_number().over(order))
    kept = placed.filter(placed.place < top).order_by("item", "place")
    return kept.select(item_row="item", neighbour_row="neighbour", score=kept.score.cast("float32"))
