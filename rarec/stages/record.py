"""`record.json` of a run: what each stage took, on what machine, by which commit. Only what is made is noted."""

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rarec.errors import Stopped
from rarec.files import read_json, write_json
from rarec.hardware import machine
from rarec.stages.context import Context
from rarec.version import source


def perform(context: Context, stage: str) -> Any:
    """Run a stage by its name, and note in the run's record what it took if it made anything or went on with it.

    What a sitting took that was killed is not known here; for training, `done.json` has the seconds of all sittings.
    """
    source()  # as the code was when it was loaded, not as it may be hours later
    context.made, started = False, time.monotonic()
    try:
        result = getattr(import_module(f"rarec.stages.{stage}"), stage)(context)
    except Stopped:
        _note(context, stage, time.monotonic() - started)
        raise
    _note(context, stage, time.monotonic() - started)
    return result


def _note(context: Context, stage: str, seconds: float) -> None:
    if not context.made or not context.world.is_main:
        return
    path = context.paths.record
    record = read_json(path) if path.exists() else {}
    before = {} if context.fresh else record.get(stage, {})
    here = {"hardware": machine(context.world.device), "ranks": context.world.size, **source()}
    others = _earlier(before, here)
    seconds = round(before.get("seconds", 0.0) + seconds, 2)
    record[stage] = {"seconds": seconds, **here, **({"earlier": others} if others else {})}
    write_json(path, record)


def _earlier(before: Mapping[str, Any], here: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where and by what else a stage was begun, each once."""
    sittings = [*before.get("earlier", []), {name: before.get(name) for name in here}] if before else []
    return [one for one in sittings if one != here]
