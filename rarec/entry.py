"""The entry that the command line and the scripts in `launch/` share: open a run, run a stage of it.

Its own imports are light, so that an error while all else is imported ends in order.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rarec.console.last_resort import crash_context
from rarec.errors import UserError

if TYPE_CHECKING:
    from rarec.stages.run import Run


def open_run(config: Path | str, overrides: Iterable[str] | None = None) -> "Run":
    """Read the configuration and return its run."""
    from rarec.console.progress import say
    from rarec.stages.run import Run

    crash_context["configuration"] = Path(config)
    try:
        run = Run(config, overrides or [], say=say)
    except UserError as error:
        error.shared = True  # every rank reads the same file
        raise
    crash_context["directory"] = run.root
    return run


def run_stage(name: str, config: Path | str, overrides: Iterable[str] | None = None, fresh: bool = False) -> "Run":
    """Run one stage on this rank, which watches over the others; return the run."""
    from rarec.distributed.watchdog import watched

    run = open_run(config, overrides)
    with watched(run.world):
        run.make(name, fresh=fresh)
    return run


def launch(stage: str) -> None:
    """Run a stage as the scripts in `launch/` do: `rarec STAGE`, but with `--config CONFIG` instead of `CONFIG`."""
    from rarec.__main__ import main

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config")
    given, others = parser.parse_known_args()
    sys.argv[1:] = [stage, *([given.config] if given.config else []), *others]
    main()
