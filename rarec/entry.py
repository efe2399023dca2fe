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
"""Messages of a full disk, a used-up quota and a file-size limit."""
WAITING = {"GOMP_SPINCOUNT": "1000"}
"""How long an OpenMP thread spins for the others before it sleeps. GNU's own default, milliseconds, takes the cores of
a busy machine; not spinning at all makes small operations 1.6 times slower (`tools/bench_waiting.py`)."""
STOPPED = 130
"""Exit code of a command ended by Ctrl-C."""


def say(line: str) -> None:
    """Print one line to standard error, on rank 0 alone. Standard output is for results."""
    if rank() == 0:
        console.print(line, soft_wrap=True, markup=False)


def rank() -> int:
    """Return the rank of this process among those that a launcher started."""
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
    """End Ctrl-C with one line and exit code 130; the same command resumes.

    A signal that asks training to stop ends it with exit code 0, so that a batch system sees a job that obeyed.
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
    """Call a command; turn a `UserError`, a full disk or a refused file into one message and exit code 2."""
    if not {"OMP_WAIT_POLICY", *WAITING} & os.environ.keys():
        os.environ |= WAITING  # before torch is loaded
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
    """Return the message for an error of the machine, such as a full disk; None for an error of the program."""
    where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
    # Searched in the text: safetensors, DuckDB and Arrow raise exceptions of their own.
    full = next((text for text in FULL if text in str(error)), None)
    if full:
        remedy = "free space on the disk of run.dir, then run the same command to resume"
        return f"{full}{where}\n  -> {remedy}"
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return f"{error.strerror}{where}\n  -> choose a run.dir that you may write to, and inputs that you may read"
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        return f"{error.strerror}{where}\n  -> another file has that name: move it away, or choose another run.dir"
    return None
