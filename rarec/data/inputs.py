"""The two inputs of a preparation, the log and the catalogue, as its steps expect them."""

from collections.abc import Callable
from dataclasses import dataclass

import ibis
import ibis.expr.types as ir

from rarec.config.schema import Interactions, Items
from rarec.data import steps
from rarec.data.engine import EmbeddedEngine
from rarec.data.files import Files
from rarec.errors import UserError


@dataclass(frozen=True)
class Catalogue:
    """The items, one row each, and what was wrong with the rest.

    Attributes:
        table: `line`, `item`, `key`, `title`, `text`.
        counts: rows, rows_without_id, repeated_ids, untitled.
        name: of the file, for messages.
    """

    table: ir.Table
    counts: dict[str, int]
    name: str


def read_catalogue(engine: EmbeddedEngine, config: Items, files: Files, say: Callable[[str], None]) -> Catalogue:
    """Read the items: the first row of each id counts, and a missing title is replaced; both are counted and told.

    Raises:
        UserError: no row has an id; or as `EmbeddedEngine.read`.
    """
    texts = {f"text_{index}": name for index, name in enumerate(config.text)}
    columns = {"title": config.title, **texts}
    table = engine.read(files, "prepare.items", ids={"item": config.item}, order={}, text=columns)
    further = [steps.clean_text(table[role]) for role in texts]
    table = table.select(
        "line",
        "item",
        key=table["item"].cast("string"),
        given=steps.clean_text(table.title),
        text=ibis.literal(", ").join(further) if further else ibis.literal(""),
    )
    without = table.count(where=table["item"].isnull())
    rows = engine.rows(table.agg(rows=table.count(), rows_without_id=without, ids=table.key.nunique()))[0]
    table = steps.first_of_each_item(table.filter(table["item"].notnull()))
    untitled = engine.value(table.count(where=table.given.isnull()))
    table = table.mutate(title=table.given.fill_null(config.untitled)).drop("given")
    repeated = rows["rows"] - rows["rows_without_id"] - rows.pop("ids")
    counts = {**rows, "repeated_ids": repeated, "untitled": untitled}
    found = Catalogue(engine.keep("items", table), counts, files.name)
    _tell(found, config, say)
    return found


def _tell(catalogue: Catalogue, config: Items, say: Callable[[str], None]) -> None:
    counts, name = catalogue.counts, catalogue.name
    if counts["rows"] == counts["rows_without_id"]:
        raise UserError(f"{name}: column {config.item!r} is empty in every row", "see prepare.items.item")
    told = {
        "rows_without_id": "rows without an item id: dropped",
        "repeated_ids": "rows repeat an item id: the first row of each is kept",
        "untitled": f"items have no title: they are called {config.untitled!r} (prepare.items.untitled)",
    }
    for what, text in told.items():
        if counts[what]:
            say(f"{name}: {counts[what]:,} {text}")


def read_log(engine: EmbeddedEngine, config: Interactions, files: Files) -> ir.Table:
    """Read the interactions.

    Returns:
        `line`, `user`, `item` (text), `given` (time or position as the file has it), `order` (as float64, null where it
        is none: see `refuse_unordered`).
    """
    role, name = ("time", config.time) if config.time is not None else ("position", str(config.position))
    ids = {"user": config.user, "item": config.item}
    log = engine.read(files, "prepare.interactions", ids=ids, order={role: name}, text={})
    given = log[role]
    order = steps.as_number(given)
    if role == "time":
        largest = engine.value(order.abs().max()) or 0.0
        order = steps.as_seconds(given, next(divisor for limit, divisor in steps.UNITS if largest < limit))
    return log.select("line", "user", item=log["item"].cast("string"), given=given.cast("string"), order=order)


def refuse_unordered(engine: EmbeddedEngine, log: ir.Table, config: Interactions, files: Files) -> None:
    """Refuse a log in which a row has no place in time.

    Raises:
        UserError: naming the first such row, and how many there are.
    """
    bad = log.filter(log.order.isnull())
    count = engine.value(bad.count())
    if not count:
        return
    role, name = ("time", config.time) if config.time is not None else ("position", config.position)
    row = engine.rows(bad.order_by(bad.line).limit(1))[0]
    what = f"is {row['given']!r}" if row["given"] is not None else "is missing"
    wanted = "epoch seconds or milliseconds, or ISO 8601" if role == "time" else "a number"
    where = f"{files.name}, data row {row['line']} (user {row['user']!r}, item {row['item']!r})"
    raise UserError(
        f"{where}: {name} {what}; {count} such rows",
        f"prepare.interactions.{role} needs {wanted} in every row: mend them or take them out",
    )
