"""`rarec run`: every stage in order, or some of them; what is done already is left as it is."""

import time
from collections.abc import Callable, Sequence

from rarec.config import COMPARING
from rarec.errors import UserError
from rarec.stages.context import Context
from rarec.stages.evaluate import evaluate
from rarec.stages.export import export
from rarec.stages.ids import ids
from rarec.stages.prepare import prepare
from rarec.stages.record import perform
from rarec.stages.report import report
from rarec.stages.shards import shards
from rarec.stages.train import train

STAGES: dict[str, Callable[[Context], object]] = {
    "prepare": prepare,
    "ids": ids,
    "shards": shards,
    "train": train,
    "evaluate": evaluate,
    "export": export,
    "report": report,
}


def named(text: str) -> list[str]:
    """The stages that a text names, by spaces.

    Raises:
        UserError: one is unknown, or there is none.
    """
    names = text.split()
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        what = f"unknown stage {unknown[0]!r}" if unknown else "no stage is named"
        raise UserError(what, f"there are: {' '.join(STAGES)}")
    return names


def run(context: Context, stages: Sequence[str] = tuple(STAGES)) -> None:
    """Stages in their order, telling how long each took."""
    if any(name in COMPARING for name in stages):
        _ = context.main  # refused now rather than after the training
    for name in [name for name in STAGES if name in stages]:
        context.say(f"\n{name}")
        started = time.monotonic()
        perform(context, name)
        context.say(f"{name} took {time.monotonic() - started:.0f} s")
