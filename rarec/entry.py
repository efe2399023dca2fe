"""The entry that the command line and the scripts in `launch/` share: run a stage, print to the user, end in order.

Its own imports are light, so that whatever goes wrong later, while the rest is imported included, ends in order.
"""

import argparse
import atexit
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from rarec.console.crash import crash_line
from rarec.console.inert import OutputClosed, inert_streams
from rarec.console.launcher import check_launcher, rank
from rarec.errors import EXIT_CODE, Stopped, Terminated, UserError, in_short

if TYPE_CHECKING:
    from rarec.distributed.world import World
    from rarec.stages.run import Run

EXHAUSTED = {
    **dict.fromkeys(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), "free space on the disk of run.dir"),
    **dict.fromkeys(map(os.strerror, (errno.EMFILE, errno.ENFILE)), "allow more open files (ulimit -n 4096)"),
    **dict.fromkeys((os.strerror(errno.EAGAIN), "can't start new thread"), "free memory, or allow more processes"),
}
"""Messages of a full disk, a used-up quota, a file-size limit, limits of open files and threads; with what to do."""
STARVED = tuple(map(os.strerror, (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)))
"""Messages of a process that is out of memory, threads or open files. A file that it fails to read is not damaged."""
_ANOTHER = "another file has that name: move it away, or choose another run.dir"
_REMEDIES = {
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), _ANOTHER),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link that leads back to itself, or name another path",
}
"""Remedies for errors of a path."""
WAITING = {"GOMP_SPINCOUNT": "1000"}
"""How long an OpenMP thread spins for the others before it sleeps. GNU's own default, milliseconds, takes the cores of
a busy machine; not spinning at all makes training an ID model 1.2 times slower (`tools/bench_waiting.py`)."""
SIGNALLED = 128
"""Exit code of a command ended by a signal, less the number of the signal: 130 for Ctrl-C, as a shell reports it."""
CRASHED = 70
"""Exit code after an error that rarec did not expect: EX_SOFTWARE of sysexits.h."""
AGAIN = 1.0
"""Seconds after which a second Ctrl-C is somebody who cannot wait for what is being tidied up."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_opened: dict[str, Path] = {}
"""For the report of a crash: the configuration of this command's run, and `run.dir`."""


def say(line: str) -> None:
    """Print one line to standard error, on rank 0 alone. Standard output is for results."""
    if rank() == 0:
        from rarec.console.progress import console

        console.print(in_short(line), soft_wrap=True)


def open_run(config: Path | str, overrides: Iterable[str] | None = None) -> "Run":
    """Read the configuration and return its run."""
    from rarec.stages.run import Run

    _opened["config"] = Path(config)
    try:
        run = Run(config, overrides or [], say=say)
    except UserError as error:
        error.shared = True  # every rank reads the same file
        raise
    _opened["directory"] = run.root
    return run


def run_stage(name: str, config: Path | str, overrides: Iterable[str] | None = None, fresh: bool = False) -> "Run":
    """Run one stage on this rank, which watches over the others; return the run."""
    run = open_run(config, overrides)
    with watched(run.world):
        run.make(name, fresh=fresh)
    return run


@contextmanager
def watched(world: "World") -> Iterator[None]:
    """Watch over the other ranks while it lasts, if there are any: one that dies, fails or hangs is named."""
    if world.size == 1:
        yield
        return
    from rarec.distributed.watchdog import Watchdog

    with Watchdog.over(world, print_from_any_rank):
        yield


def main() -> None:
    """Run the `rarec` command."""
    guarded(lambda: import_module("rarec.cli").command())


def launch(stage: str) -> None:
    """Run a stage as the scripts in `launch/` do: parse `--config CONFIG [--fresh] [section.field=value ...]`."""
    guarded(lambda: _launch(stage))


def _launch(stage: str) -> None:
    parser = _Parser(description=f"Run the stage `{stage}`, as `rarec {stage}` does, on every rank.")
    parser.add_argument("--config", required=True, type=Path, help="run configuration, YAML")
    parser.add_argument("--fresh", action="store_true", help="build it anew; what is there stays until that is whole")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    run_stage(stage, arguments.config, arguments.overrides, arguments.fresh)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"see {self.prog} --help", shared=True)


def print_from_any_rank(line: str) -> None:
    """Print one line to standard error, whichever rank this is."""
    print(line, file=sys.stderr, flush=True)


def guarded(command: Callable[[], object]) -> None:
    """Call a command; whatever ends it early becomes one line on standard error and an exit code.

    | code | reason |
    | --- | --- |
    | 0 | done; or a signal asked training to stop, and it saved a checkpoint: a batch system sees a job that obeyed |
    | 2 | bad input, a full disk, a refused file: the line names it and a remedy |
    | 70 | an error that nobody foresaw: the line names the stage and the file with the traceback |
    | 128 + n | signal n: 130 for Ctrl-C, 143 for SIGTERM; 141 where the reader of standard output has left, silently |
    """
    if not {"OMP_WAIT_POLICY", *WAITING} & os.environ.keys():
        os.environ |= WAITING  # before torch is loaded
    signals = _Signals()
    try:
        with inert_streams():
            code = _exit_code(command, signals)
    except (KeyboardInterrupt, Terminated) as error:  # in the very moment in which another error is caught
        signals.ignore()
        code = _report(error)
    signals.ignore()  # all is said; while Python ends, a signal would only cost the exit code
    if code is not None:
        sys.exit(code)


def _exit_code(command: Callable[[], object], signals: "_Signals") -> int | None:
    try:
        signals.listen()
        _opened.clear()
        check_launcher()
        command()
        sys.stdout.flush()  # now, while an error of standard output can be reported
        return None
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        signals.ignore()  # a second Ctrl-C must not cut the line short
        code = _report(signals.cause or error)
        signals.cause = None  # its frames go too: a `with` that was interrupted on its way in tidies up
        return code


class _Signals:
    """The signals that end a command, wherever it is: raised, so that nothing half-written stays behind.

    Attributes:
        cause: what was raised; libraries turn it into errors of their own, such as `Query interrupted`.
    """

    def __init__(self) -> None:
        defaults = (signal.SIG_DFL, signal.default_int_handler)  # one that is ignored, as by nohup, stays so
        self._own = [number for number in _ENDING if signal.getsignal(number) in defaults]
        self._owner, self._since = os.getpid(), 0.0
        self.cause: BaseException | None = None

    def listen(self) -> None:
        for number in self._own:
            signal.signal(number, self._raise)

    def ignore(self) -> None:
        for number in self._own:
            signal.signal(number, signal.SIG_IGN)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a fork has nothing to tidy up
            os._exit(SIGNALLED + number)
        again = time.monotonic() - self._since < AGAIN or number != signal.SIGINT
        if self.cause is not None and again:  # batch systems and launchers repeat it
            return
        self.cause, self._since = (
            KeyboardInterrupt() if number == signal.SIGINT else Terminated(number),
            time.monotonic(),
        )
        raise self.cause


def _report(error: BaseException) -> int:
    """Print one line about what ended a command, and nothing else; return the exit code."""
    _suppress_later_errors()
    if isinstance(error, OutputClosed):
        return SIGNALLED + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt | Terminated | Stopped):
        ended = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        if _rank() == 0:
            _print_safely(f"{ended}; run the same command to resume")
        number = error.number if isinstance(error, Terminated) else signal.SIGINT
        return 0 if isinstance(error, Stopped) else SIGNALLED + number
    starved = any(text in str(error) for text in STARVED)
    message = str(error) if isinstance(error, UserError) and not starved else machine_trouble(error)
    if _rank() == 0 or not getattr(error, "shared", False):
        line = message or crash_line(error, str(_opened.get("config", "")), _opened.get("directory"), _rank())
        where = f"rank {_rank()}: " if _rank() else ""
        _print_safely(f"{where}{line}", "error:")
    return EXIT_CODE if message else CRASHED


def _suppress_later_errors() -> None:
    """Suppress errors of destructors and of Python's shutdown: they follow from the error that is reported."""
    sys.unraisablehook = lambda _: None  # until `inert_streams` ends
    atexit.register(lambda: setattr(sys, "stderr", None))


def _print_safely(line: str, sign: str = "") -> None:
    """Print one line to standard error, whatever is broken, rich included."""
    try:
        from rich.text import Text

        from rarec.console.progress import console

        console.print(Text.assemble((sign, "bold red"), " " if sign else "", line), soft_wrap=True)
    except Exception:
        print_from_any_rank(f"{sign} {line}".strip())


def _rank() -> int:
    """Return this process's rank; 0 if the variable that holds it makes no sense, which is the error to report."""
    try:
        return rank()
    except UserError:
        return 0


def machine_trouble(error: BaseException) -> str | None:
    """Return the message for an error of the machine, such as a full disk; None for an error of the program."""
    path = str(error.filename) if isinstance(error, OSError) and error.filename else ""
    where = f": {path}" if path else ""
    # Searched in the text: safetensors, DuckDB and Arrow raise exceptions of their own.
    end = next((text for text in EXHAUSTED if text in str(error)), None)
    if end:
        return f"{end}{where}\n  -> {EXHAUSTED[end]}, then run the same command to resume"
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        remedy = "choose a run.dir that you may write to, and inputs that you may read"
        return in_short(f"{_not_allowed(path)}: {error.strerror}") + f"\n  -> {remedy}"
    if isinstance(error, FileNotFoundError) and not path and not _is_somewhere():
        return "the current directory does not exist any more\n  -> cd to one that does"
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return in_short(f"{error.strerror}{where}") + f"\n  -> {_REMEDIES[error.errno]}"
    return None


def _not_allowed(path: str) -> str:
    """Return what this user may not do with a path."""
    closed = [folder for folder in Path(path).parents if os.path.lexists(folder) and not os.access(folder, os.X_OK)]
    if closed:
        return f"{closed[-1]} may not be entered"
    unreadable = path and Path(path).exists() and not os.access(path, os.R_OK)
    return f"{path or 'a file'} may not be {'read' if unreadable else 'written'}"


def _is_somewhere() -> bool:
    """Return whether there is a current directory."""
    try:
        return bool(Path.cwd())
    except FileNotFoundError:
        return False
