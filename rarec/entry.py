"""What every entry point does alike: read the configuration, speak to the user, end on a signal or with one message."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from rarec.config import load_config
from rarec.errors import EXIT_CODE, Stopped, UserError

if TYPE_CHECKING:
    from rarec.stages.context import Context

FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
"""How a full disk, a spent quota and too small a file limit read."""
STOPPED = 130
"""The exit code that shells give a command ended by Ctrl-C."""
console = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """Tell the user one line, on standard error: standard output is for results. The first rank speaks for all."""
    if rank() == 0:
        console.print(line, soft_wrap=True, markup=False)


def rank() -> int:
    """Of this process among those that a launcher started."""
    return int(os.environ.get("RANK", "0"))


def open_context(config: Path | str, overrides: list[str] | None, fresh: bool = False) -> "Context":
    """Read the configuration; imports the stages' machinery."""
    try:
        settings = load_config(config, overrides or [])
    except UserError as error:
        error.shared = True  # every rank reads the same file
        raise
    from rarec.stages.context import Context

    return Context(settings, say, fresh)


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C ends with one line and exit code 130: what is made stays, the same command goes on.

    A signal that asks training to end does so with exit code 0: a batch system is to see a job that did as it was told.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        sys.exit(STOPPED)
    except Stopped as stopped:
        say(f"{stopped}; the same command goes on from here")
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
