"""The account of a preparation: what every step left, told as it happens and kept for the manifest."""

from collections.abc import Callable
from typing import Any

import ibis.expr.types as ir

from rarec.data.engines import Engine
from rarec.errors import UserError


class Ledger:
    """Counts a log before and after each step, and refuses a step that leaves nothing.

    Args:
        engine: counts.
        log: the first log.
        name: of the log's table, for messages.
        say: tells the user one line.

    Attributes:
        log: what is left.
        counts: of its interactions, users and items.
        steps: the account, one entry a step, plain JSON.
    """

    def __init__(self, engine: Engine, log: ir.Table, name: str, say: Callable[[str], None]) -> None:
        self.engine, self.log, self.steps = engine, log, list[dict[str, Any]]()
        self._name, self._say = name, say
        self.counts = self._count(log)
        say("read " + name + ": " + ", ".join(f"{count:,} {what}" for what, count in self.counts.items()))

    def apply(self, step: str, log: ir.Table, note: str, remedy: str) -> None:
        """Take the log that a step gives.

        Args:
            step: what it is called, the configuration's field where there is one.
            log: cheap to read again: kept by the engine, or close to what is.
            note: why rows were dropped.
            remedy: what to do if it leaves nothing.

        Raises:
            UserError: no interaction is left.
        """
        before, after = self.counts, self._count(log)
        lost = {what: before[what] - after[what] for what in before if before[what] > after[what]}
        counts = {f"{what}_before": count for what, count in before.items()}
        counts |= {f"{what}_after": count for what, count in after.items()}
        self.steps.append({"step": step, **counts, "note": note})
        if lost:
            self._say(f"{step}: dropped {', '.join(f'{count:,} {what}' for what, count in lost.items())} ({note})")
        if not after["interactions"]:
            problem = f"{self._name}: no user and no item is left after the step {step} ({note})"
            raise UserError(f"{problem}; before it: {before}", remedy)
        self.log, self.counts = log, after

    def unchanged(self, step: str, note: str) -> None:
        """Note a step that had nothing to drop, if it was not noted before."""
        if all(step != entry["step"] for entry in self.steps):
            same = {f"{what}_{when}": count for when in ("before", "after") for what, count in self.counts.items()}
            self.steps.append({"step": step, **same, "note": note})

    def _count(self, log: ir.Table) -> dict[str, int]:
        counts = log.agg(interactions=log.count(), users=log.user.nunique(), items=log["item"].nunique())
        return self.engine.rows(counts)[0]
