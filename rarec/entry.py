"""The entry that the command line and the scripts in `launch/` share: open a run, run a stage of it.

Its own imports are light, so that an error while all else is imported ends in order.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rarec.console.last_resort import crash_context, guarded
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
    """Run a stage as the scripts in `launch/` do, on every rank."""
    guarded(lambda: _launch(stage))


def _launch(stage: str) -> None:
    parser = _Parser(description=f"Run the stage `{stage}`, as `rarec {stage}` does, on every rank.")
    parser.add_argument("--config", required=True, type=Path, help="run configuration, YAML")
    parser.add_argument(
        "--fresh", action="store_true", help="rebuild it; what is there stays until its replacement is whole"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    run_stage(stage, arguments.config, arguments.overrides, arguments.fresh)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"see {self.prog} --help", shared=True)
