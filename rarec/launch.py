"""What the scripts in `launch/` share: a stage that `accelerate launch` starts, on one rank or many."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rarec.entry import guarded, open_context, stoppable


def start(stage: str) -> None:
    """Parse `--config CONFIG [--fresh] [section.field=value ...]` and run the stage."""
    parser = argparse.ArgumentParser(description=f"Run the stage `{stage}`.")
    parser.add_argument("--config", required=True, type=Path, help="run configuration, YAML")
    parser.add_argument("--fresh", action="store_true", help="make it again, replacing what was made before")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    guarded(lambda: run(stage, arguments.config, arguments.overrides, arguments.fresh))


def run(stage: str, config: Path, overrides: Sequence[str], fresh: bool = False) -> None:
    """Run a stage on this rank, which watches over the others."""
    with stoppable():
        context = open_context(config, list(overrides), fresh)
        from rarec.training.watchdog import Watchdog

        with Watchdog.over(context.world, _say):
            import_module("rarec.stages.record").perform(context, stage)


def _say(line: str) -> None:
    """Whichever rank this is."""
    print(line, file=sys.stderr, flush=True)
