"""The entry that the command line and the scripts in `launch/` share: run a stage, print to the user, end in order."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from rarec.errors import EXIT_CODE, Stopped, UserError
from rarec.progress import console

if TYPE_CHECKING:
    from rarec.stages.run import Run

FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
"""How a full disk, a spent quota and too small a file limit read."""
STOPPED = 130
"""The exit code that shells give a command ended by Ctrl-C."""


def say(line: str) -> None:
    """Tell the user one line, on standard error: standard output is for results. The first rank speaks for all."""
    if rank() == 0:
        console.print(line, soft_wrap=True, markup=False)


def rank() -> int:
    """Of this process among those that a launcher started."""
    return int(os.environ.get("RANK", "0"))


def open_run(config: Path | str, overrides: Iterable[str] | None = None) -> "Run":
    """Read the configuration and return its run."""
    from rarec.stages.run import Run

    try:
        return Run(config, overrides or [], say=say)
    except UserError as error:
        error.shared = True  # every rank reads the same file
        raise


def run_stage(name: str, config: Path | str, overrides: Iterable[str] | None = None, fresh: bool = False) -> "Run":
    """Run one stage on this rank, which watches over the others; return the run."""
    with stoppable():
        run = open_run(config, overrides)
        with watched(run):
            run.make(name, fresh=fresh)
        return run


@contextmanager
def watched(run: "Run") -> Iterator[None]:
    """Watch over the other ranks while it lasts, if there are any: one that dies, fails or hangs is named."""
    if run.world.size == 1:
        yield
        return
    from rarec.training.watchdog import Watchdog

    with Watchdog.over(run.world, print_from_any_rank):
        yield


def launch(stage: str) -> None:
    """Run a stage as the scripts in `launch/` do: parse `--config CONFIG [--fresh] [section.field=value ...]`."""
    parser = argparse.ArgumentParser(description=f"Run the stage `{stage}`, as `rarec {stage}` does, on every rank.")
    parser.add_argument("--config", required=True, type=Path, help="run configuration, YAML")
    parser.add_argument("--fresh", action="store_true", help="build it anew; what is there stays until that is whole")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    guarded(lambda: run_stage(stage, arguments.config, arguments.overrides, arguments.fresh))


def print_from_any_rank(line: str) -> None:
    """Print one line to standard error, whichever rank this is."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C ends with one line and exit code 130: what is made stays, the same command goes on.

    A signal that asks training to end does so with exit code 0: a batch system is to see a job that did as it was told.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; run the same command to resume")
        sys.exit(STOPPED)
    except Stopped as stopped:
        say(f"{stopped}; run the same command to resume")
        sys.exit(0)


def guarded(command: Callable[[], object]) -> None:
    """Call a command; a `UserError`, a full disk or a refused file becomes one clear message and exit code 2."""
    try:
        command()
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else machine_trouble(error)
        if message is None:
            raise
        if rank() == 0 or not getattr(error, "shared", False):
            where = f"rank {rank()}: " if rank() else ""
            console.print(f"[bold red]error:[/bold red] {escape(where + message)}", soft_wrap=True)
        sys.exit(EXIT_CODE)


def machine_trouble(error: Exception) -> str | None:
    """What to say where the machine, not the program, is at fault; None otherwise."""
    where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
    # Looked for in the text: safetensors, DuckDB and Arrow raise types of their own.
    full = next((text for text in FULL if text in str(error)), None)
    if full:
        remedy = "make room where run.dir lies; what is whole stays, and the same command goes on from here"
        return f"{full}{where}\n  -> {remedy}"
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return f"{error.strerror}{where}\n  -> choose a run.dir that you may write to, and inputs that you may read"
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        return f"{error.strerror}{where}\n  -> something else stands there: move it away, or choose another run.dir"
    return None
