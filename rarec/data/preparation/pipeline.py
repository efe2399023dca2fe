"""Prepare a dataset: read, filter, number, split and write the tables; every step is counted.

Memory is bounded: the engine holds the tables and spills to disk, and results are streamed. The same input and settings
give the same bytes on every engine. The order of the log's rows matters among interactions of one user and time alone.
"""

from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import ibis.expr.types as ir

from rarec.config.schema import Prepare
from rarec.data import tables
from rarec.data.engines import PrepareEngine, compute_value, open_engine
from rarec.data.preparation import steps
from rarec.data.preparation.inputs import check_order, read_catalogue, read_log, table_location, use_same_ids
from rarec.errors import UserError

Say = Callable[[str], None]


def write_dataset(config: Prepare, directory: Path, say: Say) -> dict[str, Any]:
    """Prepare a dataset from the log and the catalogue; return the figures for its manifest.

    Args:
        config: the section `prepare`.
        directory: directory to write the tables to.
        say: print one line to the user.

    Raises:
        UserError: the input is invalid (the message names file, row or field, and a remedy), or no data is left.
    """
    _check(config)
    with open_engine(config, directory / "spill") as engine:
        return _Preparation(config, engine, say).write(directory)


def _check(config: Prepare) -> None:
    """Check the settings of a temporal split and of new items."""
    if config.split.new_items and config.min_user_interactions < steps.MIN_INTERACTIONS:
        short = f"users with fewer than {steps.MIN_INTERACTIONS} interactions"
        problem = f"prepare.split.new_items: {short} train on their last one, which may be a new item"
        raise UserError(problem, f"set prepare.min_user_interactions to {steps.MIN_INTERACTIONS} or more")
    if config.split.kind != "temporal":
        return
    if config.split.new_items:
        remedy = "set it to 0 (items after the cut are new anyway), or use leave_one_out"
        raise UserError("prepare.split.new_items: not available for a temporal split", remedy)
    if config.interactions.time is None:
        remedy = "set prepare.interactions.time, or use leave_one_out"
        raise UserError("prepare.split.kind: a temporal split needs times, but the log has positions only", remedy)
    if config.split.validation_share + config.split.test_share >= 1:
        problem = "prepare.split: validation_share and test_share leave no training interactions"
        raise UserError(problem, "their sum must be below 1")


class _Preparation:
    """One preparation on one engine. Each step is counted, and one that leaves nothing is refused.

    Attributes:
        log: the log after the last step.
        counts: its number of interactions, users and items.
        steps: one record per step, plain JSON, for the manifest.
    """

    def __init__(self, config: Prepare, engine: PrepareEngine, say: Say) -> None:
        self.config, self.engine, self.say = config, engine, say
        self.log_location = table_location(config.interactions, "prepare.interactions")
        self.items_location = table_location(config.items, "prepare.items")
        self.log: ir.Table
        self.counts: dict[str, int] = {}
        self.steps: list[dict[str, Any]] = []

    def write(self, directory: Path) -> dict[str, Any]:
        """Write the three tables and their columns; return the figures for the manifest."""
        catalogue, catalogue_counts = read_catalogue(self.engine, self.config.items, self.items_location, self.say)
        user_codes = self._read()
        item_codes = self._code(catalogue, user_codes)
        self._filter(item_codes)
        users = self.engine.keep("users", steps.dense_rows(user_codes, self.log.user))
        # without a minimum, the whole catalogue is kept, including unused items
        kept_items = self.log["item"] if self.config.min_item_interactions else item_codes.code
        items = self.engine.keep("items", steps.dense_rows(item_codes, kept_items))
        sequences = self.engine.keep("sequences", steps.build_sequences(self.log, users, items))
        split, cuts = self._split(sequences)
        users = self.engine.keep("users", users.inner_join(split, "row"))
        counts = self._tables(users, items, catalogue, sequences, directory)
        tables.write_columns(directory)
        self.say(", ".join(f"{count:,} {unit.replace('_', ' ')}" for unit, count in counts.items()))
        return {
            "counts": counts,
            "steps": self.steps,
            "catalogue": catalogue_counts,
            "tie_rule": steps.TIE_RULE,
            "cut_times": cuts,
            "engine": self.config.engine.partition(":")[0],
        }

    def _apply(self, step: str, log: ir.Table, note: str, remedy: str, **known: int) -> None:
        """Record a step and take over its log.

        Args:
            step: name of the step: the configuration field if there is one.
            log: log after the step; must be cheap to read again, so kept by the engine or derived from a kept table.
            note: reason for dropped rows.
            remedy: what to do if nothing is left.
            **known: number of users or items left, if the step knows it: counting takes a pass over the log.

        Raises:
            UserError: no interaction is left.
        """
        before, after = self.counts, {**self.counts, **self._count(log, ["interactions"])}
        if after != before:
            unknown = [unit for unit in ("users", "items") if unit not in known]
            after |= known | (self._count(log, unknown) if unknown else {})
        lost = {unit: before[unit] - after[unit] for unit in before if before[unit] > after[unit]}
        counts = {f"{unit}_before": count for unit, count in before.items()}
        counts |= {f"{unit}_after": count for unit, count in after.items()}
        self.steps.append({"step": step, **counts, "note": note})
        if lost:
            self.say(f"{step}: dropped {', '.join(f'{count:,} {unit}' for unit, count in lost.items())} ({note})")
        if not after["interactions"]:
            problem = f"{self.log_location.name}: no interaction is left after the step {step} ({note})"
            raise UserError(f"{problem}; before it: {before}", remedy)
        self.log, self.counts = log, after

    def _count(self, log: ir.Table, units: Iterable[str] = ("interactions", "users", "items")) -> dict[str, int]:
        counts = {"interactions": log.count(), "users": log.user.nunique(), "items": log["item"].nunique()}
        return self.engine.rows(log.agg(**{unit: counts[unit] for unit in units}))[0]

    def _read(self) -> ir.Table:
        """Read the raw log, drop rows without ids, check that all rows have an order, and number the users."""
        config, engine, location = self.config.interactions, self.engine, self.log_location
        raw = read_log(engine, config, location)
        self.counts = self._count(raw)
        self.say(f"read {location.name}: {', '.join(f'{count:,} {unit}' for unit, count in self.counts.items())}")
        log = steps.drop_missing_ids(raw)
        check_order(engine, config, location, log)
        users = engine.keep("user_codes", steps.number_ids(log.user))
        remedy = f"check that the columns {config.user!r} and {config.item!r} contain the ids"
        self._apply("ids", log, "no user or no item id", remedy, users=compute_value(engine, users.count()))
        self._apply("order", log, f"every row has its {'place in time' if config.time else 'position'}", "")
        return users

    def _code(self, catalogue: ir.Table, users: ir.Table) -> ir.Table:
        """Replace ids by codes, drop items that are not in the catalogue, and return the numbering of the items."""
        items = self.engine.keep("item_codes", steps.number_ids(catalogue["item"]))
        known = self.engine.keep("log", steps.encode_ids(self.log, users, items))
        remedy = ""
        if not compute_value(self.engine, known.count()):
            remedy = use_same_ids(self.engine, self.log, catalogue)
        self._apply("catalogue", known, "item not in the catalogue", remedy)
        return items

    def _filter(self, item_codes: ir.Table) -> None:
        """Drop duplicates, repeats and held-back items; then users and items with too few interactions, repeatedly."""
        config, keep = self.config, self.engine.keep
        same = {unit: self.counts[unit] for unit in ("users", "items")}  # every user and item keeps a row
        if config.drops_duplicates:
            log = keep("log", steps.drop_duplicates(self.log))
            self._apply("duplicates", log, "same user, item and time again", "", **same)
        if config.repeats != "keep":
            log = keep("log", steps.drop_repeats(self.log, config.repeats))
            self._apply("repeats", log, f"same user and item again: {config.repeats} kept", "", **same)
        if config.split.new_items:
            log = keep("log", steps.hold_back_new_items(self.log, item_codes, config.split.new_items))
            note = "items taken as new, but where they are a user's last"
            self._apply("new_items", log, note, "lower prepare.split.new_items", users=self.counts["users"])
        columns: Iterable[steps.Column] = cycle(("item", "user"))
        for turn, column in enumerate(columns):  # dropping items may leave users with too few, and the reverse
            if not self._drop_small(column) and turn:
                break

    def _drop_small(self, column: steps.Column) -> bool:
        """Drop items (or users) with too few interactions; return True if there were any."""
        field = f"min_{column}_interactions"
        fewest = getattr(self.config, field)
        if fewest <= 1:
            return False
        dropped = self.engine.keep("dropped", steps.below_minimum(self.log, column, fewest))
        count = compute_value(self.engine, dropped.count())
        if count or all(field != entry["step"] for entry in self.steps):
            log = self.engine.keep("log", steps.drop_ids(self.log, dropped, column)) if count else self.log
            left = {f"{column}s": self.counts[f"{column}s"] - count}
            others = " or prepare.split.new_items" if self.config.split.new_items else ""
            remedy = f"lower prepare.{field}{others}, or provide a longer log"
            self._apply(field, log, f"{column} with fewer than {fewest} interactions", remedy, **left)
        return bool(count)

    def _split(self, sequences: ir.Table) -> tuple[ir.Table, list[float]]:
        """Return the users' positions in the split, and the cut times of a temporal split."""
        config = self.config.split
        if config.kind == "leave_one_out":
            return steps.leave_one_out(sequences, config.validation_users), []
        shares = (1 - config.validation_share - config.test_share, 1 - config.test_share)
        interactions = self.counts["interactions"]
        before = [min(round(interactions * share), interactions - 1) for share in shares]
        row = self.engine.rows(steps.cut_times(sequences, before))[0]
        return steps.temporal(sequences, (row["cut_0"], row["cut_1"])), [row["cut_0"], row["cut_1"]]

    def _tables(
        self, users: ir.Table, items: ir.Table, catalogue: ir.Table, sequences: ir.Table, directory: Path
    ) -> dict[str, int]:
        """Write the tables and return their counts; training, validation and test must not be empty."""
        user_id, item_id = (table.id.type().to_pyarrow() for table in (users, items))
        order = "time" if self.config.interactions.time is not None else "position"
        train_counts = steps.train_counts(sequences, users)
        parts = {
            tables.USERS: (steps.users_table(users), tables.users_schema(user_id)),
            tables.ITEMS: (steps.items_table(items, catalogue, train_counts), tables.items_schema(item_id)),
            tables.INTERACTIONS: (steps.interactions_table(sequences, order), tables.interactions_schema(order)),
        }
        rows = {
            name.removesuffix(".parquet"): tables.write_rows(self.engine.batches(table), directory / name, schema)
            for name, (table, schema) in parts.items()
        }
        counts = {**rows, **self.engine.rows(steps.part_sizes(users))[0]}
        for part in ("training_samples", "validation_users", "test_users"):
            if not counts[part]:
                problem = f"{self.log_location.name}: the split leaves no {part.replace('_', ' ')}"
                raise UserError(f"{problem} ({counts})", "provide a longer log, or change prepare.split")
        return counts
