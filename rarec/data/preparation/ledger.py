"""The account of a preparation: what every step left, told as it happens and kept for the manifest."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ibis.expr.types as ir

from rarec.data.engines import Engine, value
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
        self.counts = engine.rows(log.agg(**_aggregates(log, ("interactions", "users", "items"))))[0]
        say("read " + name + ": " + ", ".join(f"{count:,} {what}" for what, count in self.counts.items()))

    def apply(self, step: str, log: ir.Table, note: str, remedy: str, **known: int) -> None:
        """Take the log that a step gives.

        Args:
            step: what it is called, the configuration's field where there is one.
            log: cheap to read again: kept by the engine, or close to what is.
            note: why rows were dropped.
            remedy: what to do if it leaves nothing.
            **known: users or items that are left, where the step says so: to count them takes a pass over the log.

        Raises:
            UserError: no interaction is left.
        """
        before, after = self.counts, self._count(log, known)
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

    def _count(self, log: ir.Table, known: Mapping[str, int]) -> dict[str, int]:
        interactions = int(value(self.engine, log.count()))
        if interactions == self.counts["interactions"]:
            return self.counts
        wanted = [what for what in ("users", "items") if what not in known]
        counted = self.engine.rows(log.agg(**_aggregates(log, wanted)))[0] if wanted else {}
        return {"interactions": interactions, **{what: {**counted, **known}[what] for what in ("users", "items")}}


def _aggregates(log: ir.Table, wanted: Iterable[str]) -> dict[str, ir.Scalar]:
    every = {"interactions": log.count(), "users": log.user.nunique(), "items": log["item"].nunique()}
    return {what: every[what] for what in wanted}
