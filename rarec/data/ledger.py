"""The account of a preparation: what every step left, told as it happens and kept for the manifest."""

from collections.abc import Callable
from typing import Any

import ibis.expr.types as ir

from rarec.data.engine import EmbeddedEngine
from rarec.errors import UserError


class Ledger:
    """Keeps a log after each step, counts it before and after, and refuses a step that leaves nothing.

    Args:
        engine: computes and counts.
        log: the first log.
        name: of the log's file, for messages.
        say: tells the user one line.
    """

    def __init__(self, engine: EmbeddedEngine, log: ir.Table, name: str, say: Callable[[str], None]) -> None:
        self.engine, self.log, self.steps = engine, log, list[dict[str, Any]]()
        self._name, self._say = name, say
        self._counts = self._count(log)
        say("read " + name + ": " + ", ".join(f"{count:,} {what}" for what, count in self._counts.items()))

    @property
    def interactions(self) -> int:
        """How many are left."""
        return self._counts["interactions"]

    def apply(self, step: str, log: ir.Table, note: str, remedy: str) -> None:
        """Take the log that a step gives.

        Args:
            step: what it is called, the configuration's field where there is one.
            log: the expression, over `self.log`.
            note: why rows were dropped.
            remedy: what to do if it leaves nothing.

        Raises:
            UserError: no interaction is left.
        """
        kept = self.engine.keep("interactions", log)
        before, after = self._counts, self._count(kept)
        lost = {what: before[what] - after[what] for what in before if before[what] > after[what]}
        if lost or all(step != entry["step"] for entry in self.steps):
            counts = {f"{what}_before": count for what, count in before.items()}
            counts |= {f"{what}_after": count for what, count in after.items()}
            self.steps.append({"step": step, **counts, "note": note})
        if lost:
            self._say(f"{step}: dropped {', '.join(f'{count:,} {what}' for what, count in lost.items())} ({note})")
        if not after["interactions"]:
            problem = f"{self._name}: no user and no item is left after the step {step} ({note})"
            raise UserError(f"{problem}; before it: {before}", remedy)
        self.log, self._counts = kept, after

    def _count(self, log: ir.Table) -> dict[str, int]:
        counts = log.agg(interactions=log.count(), users=log.user.nunique(), items=log["item"].nunique())
        return self.engine.rows(counts)[0]
