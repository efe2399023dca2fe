"""`rarec run`: every stage in order; what is done already is left as it is."""

import time
from collections.abc import Callable

from rarec.stages.context import Context
from rarec.stages.evaluate import evaluate
from rarec.stages.export import export
from rarec.stages.ids import ids
from rarec.stages.prepare import prepare
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


def run(context: Context) -> None:
    """Every stage in order, telling how long each took."""
    _ = context.main  # refused now rather than after the training
    for name, stage in STAGES.items():
        context.say(f"\n{name}")
        started = time.monotonic()
        stage(context)
        context.say(f"{name} took {time.monotonic() - started:.0f} s")
