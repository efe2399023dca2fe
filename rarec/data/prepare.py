"""Logs to a prepared dataset: read, filter, number, split, write; every step counted.

Bounded memory: the engine holds the tables and spills, and results stream to disk. The same input and settings give the
same bytes, in whatever order the rows of the log stand.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ibis.expr.types as ir

from rarec.artefacts import new_directory, write_manifest
from rarec.config.schema import Prepare
from rarec.data import split, steps, tables
from rarec.data.dataset import PreparedDataset
from rarec.data.engine import EmbeddedEngine, embedded_engine
from rarec.data.files import Files, digest, find_files
from rarec.data.inputs import Catalogue, read_catalogue, read_log, refuse_unordered
from rarec.data.ledger import Ledger
from rarec.errors import UserError

Say = Callable[[str], None]


def input_hashes(config: Prepare) -> dict[str, str]:
    """What a prepared dataset is made from: the sha256 of the files of the log and of the catalogue.

    Raises:
        UserError: they are not there.
    """
    return {name: digest(files) for name, files in _files(config).items()}


def prepare(config: Prepare, directory: Path, *, seed: int, say: Say) -> PreparedDataset:
    """Make a prepared dataset.

    Args:
        config: the section `prepare`.
        directory: of the artefact; what stands there is replaced once the new one is whole.
        seed: the run's, recorded with the settings; nothing here is random.
        say: tells the user one line.

    Raises:
        UserError: the input is not as it should be (file, row or field, and remedy named), or nothing is left of it.
    """
    _check(config)
    hashes = input_hashes(config)
    settings = {"seed": seed, "prepare": config.model_dump(mode="json")}
    with new_directory(directory) as aside:
        with embedded_engine(aside / "spill") as engine:
            figures = _Preparation(config, engine, say).write(aside)
        write_manifest(aside, "prepare", settings=settings, made_from=hashes, **figures)
    return PreparedDataset.open(directory)


def _files(config: Prepare) -> dict[str, Files]:
    sections = {"interactions": config.interactions.path, "items": config.items.path}
    return {name: find_files(path, f"prepare.{name}.path") for name, path in sections.items()}


def _check(config: Prepare) -> None:
    """What a temporal split needs."""
    if config.split.kind != "temporal":
        return
    if config.interactions.time is None:
        remedy = "name prepare.interactions.time, or choose leave_one_out"
        raise UserError("prepare.split.kind: a temporal split cuts in time, but the log has only positions", remedy)
    if config.split.validation_share + config.split.test_share >= 1:
        problem = "prepare.split: validation_share and test_share leave nothing to train on"
        raise UserError(problem, "their sum must be below 1")


class _Preparation:
    """One preparation on one engine."""

    def __init__(self, config: Prepare, engine: EmbeddedEngine, say: Say) -> None:
        self.config, self.engine, self.say = config, engine, say
        self.files = _files(config)

    def write(self, to: Path) -> dict[str, Any]:
        """Write the three tables; returns the manifest's figures."""
        catalogue = read_catalogue(self.engine, self.config.items, self.files["items"], self.say)
        ledger = self._filtered(catalogue)
        users, items = self._numbered(ledger.log, catalogue)
        sequences = self.engine.keep("sequences", steps.sequences(ledger.log, users, items))
        places, cuts = self._split(sequences, ledger.interactions)
        users = self.engine.keep("users", users.inner_join(places, "row"))
        counts = self._tables(users, items, sequences, to)
        self._refuse_empty_parts(counts)
        self.say(", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items()))
        figures = {"counts": counts, "steps": ledger.steps, "catalogue": catalogue.counts}
        return {**figures, "tie_rule": steps.TIE_RULE, "cut_times": cuts}

    def _filtered(self, catalogue: Catalogue) -> Ledger:
        """The log after every filter, in this order: ids, catalogue, duplicates, too few."""
        config, files = self.config, self.files["interactions"]
        ledger = Ledger(self.engine, read_log(self.engine, config.interactions, files), files.name, self.say)
        names = f"{config.interactions.user!r} and {config.interactions.item!r}"
        note = "no user or no item id"
        ledger.apply("ids", steps.with_ids(ledger.log), note, f"do the columns {names} hold the ids?")
        refuse_unordered(self.engine, ledger.log, config.interactions, files)
        known = steps.in_catalogue(ledger.log.drop("given"), catalogue.table)
        ids = f"the log has {self._span(ledger.log['item'])}, the catalogue {self._span(catalogue.table.key)}"
        ledger.apply("catalogue", known, "item not in the catalogue", f"do the ids agree? {ids}")
        if config.duplicates != "keep_all":
            kept = steps.without_repeats(ledger.log, config.duplicates)
            ledger.apply("duplicates", kept, f"same user and item again: {config.duplicates}", "")
        self._drop_small(ledger)
        return ledger

    def _drop_small(self, ledger: Ledger) -> None:
        """Drop items and users with too few interactions until none is left: each drop may make another."""
        items, users = self.config.min_item_interactions, self.config.min_user_interactions
        fewest: dict[Literal["item", "user"], int] = {"item": items, "user": users}
        before = -1
        while before != ledger.interactions:
            before = ledger.interactions
            for column, least in fewest.items():
                if least > 1:
                    field = f"min_{column}_interactions"
                    note = f"{column} with fewer than {least} interactions"
                    remedy = f"lower prepare.{field}, or give a longer log"
                    ledger.apply(field, steps.at_least(ledger.log, column, least), note, remedy)

    def _numbered(self, log: ir.Table, catalogue: Catalogue) -> tuple[ir.Table, ir.Table]:
        """Users and items with their rows. Without a minimum the whole catalogue stays, met or not."""
        items = catalogue.table
        if self.config.min_item_interactions:
            items = items.semi_join(log, items.key == log["item"])
        users = log.select("user").distinct()
        kept = self.engine.keep("users", steps.numbered(users, "user"))
        return kept, self.engine.keep("items", steps.numbered(items, "item"))

    def _split(self, sequences: ir.Table, interactions: int) -> tuple[ir.Table, list[float]]:
        """The users' places in the split, and the cuts of a temporal one."""
        chosen = self.config.split
        if chosen.kind == "leave_one_out":
            return split.leave_one_out(sequences), []
        shares = (1 - chosen.validation_share - chosen.test_share, 1 - chosen.test_share)
        before = [round(interactions * share) for share in shares]
        row = self.engine.rows(split.cut_times(sequences, before))[0]
        return split.temporal(sequences, (row["cut_0"], row["cut_1"])), [row["cut_0"], row["cut_1"]]

    def _tables(self, users: ir.Table, items: ir.Table, sequences: ir.Table, to: Path) -> dict[str, int]:
        """Write the tables; returns what they count."""
        engine, config = self.engine, self.config
        user_id, item_id = (tables.id_type(table[name]) for table, name in ((users, "user"), (items, "item")))
        order = "time" if config.interactions.time is not None else "position"
        met = split.train_counts(sequences, users)
        parts = {
            tables.USERS: (steps.users_table(users), tables.users_schema(user_id)),
            tables.ITEMS: (steps.items_table(items, met), tables.items_schema(item_id)),
            tables.INTERACTIONS: (steps.interactions_table(sequences, order), tables.interactions_schema(order)),
        }
        rows = {
            name.removesuffix(".parquet"): tables.write_rows(engine.batches(table), to / name, schema)
            for name, (table, schema) in parts.items()
        }
        return {**rows, **engine.rows(split.part_sizes(users))[0]}

    def _refuse_empty_parts(self, counts: dict[str, int]) -> None:
        """A run needs something to train on, to choose by, and to be judged by."""
        for part in ("training_samples", "validation_users", "test_users"):
            if not counts[part]:
                problem = f"{self.files['interactions'].name}: the split leaves no {part.replace('_', ' ')}"
                raise UserError(f"{problem} ({counts})", "give a longer log, or change prepare.split")

    def _span(self, ids: ir.StringColumn) -> str:
        least, greatest = (self.engine.value(value) for value in (ids.min(), ids.max()))
        return f"{least!r} to {greatest!r}"
