"""The last resort: whatever ends a command early becomes one line on standard error and an exit code.

The imports of this module are light, so that an error while all else is imported ends in order as well.
"""

import atexit
import errno
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rarec.console.inert import OutputClosed, inert, inert_streams
from rarec.errors import EXIT_CODE, Stopped, Terminated, UserError, in_short, redacted
from rarec.storage.files import write_text
from rarec.version import __version__

WAITING = {"GOMP_SPINCOUNT": "1000"}
"""How long an OpenMP thread spins for the others before it sleeps. GNU's own default, milliseconds, takes the cores of
a busy machine; not spinning at all makes training an ID model 1.2 times slower (`tools/bench/waiting.py`)."""
SIGNALLED = 128
"""Exit code of a command ended by a signal, less the number of the signal: 130 for Ctrl-C, as a shell reports it."""
CRASHED = 70
"""Exit code after an error that rarec did not expect: EX_SOFTWARE of sysexits.h."""
AGAIN = 1.0
"""Seconds after which a second Ctrl-C interrupts the cleaning up as well."""
SWALLOWED = 0.1
"""Seconds after which a signal that Python has swallowed is sent again."""
MOST_RANKS = 100_000
"""More processes than any machine runs: such a number is a mistake, and waiting for them all would never end."""
_LAST_PORT = 65_535
CRASH = "crash.txt"
"""File in `run.dir`; other ranks than 0 add their number."""
_LESS_MEMORY = (
    "use a machine with more memory, or lower prepare.memory (prepare, neighbours), batch_size or negatives of "
    "ids.MODEL (ids), prompt.max_history (shards), evaluate.batch_size (evaluate, export) or train.batch_size (train); "
    "then run the same command to resume"
)
EXHAUSTED = {
    errno.ENOSPC: f"free space on that disk (else on those of run.dir, --out and {tempfile.gettempdir()})",
    errno.EDQUOT: "free space in your quota",
    errno.EFBIG: "allow larger files (ulimit -f unlimited), or free space in your quota",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n 4096)"),
    errno.EAGAIN: "free memory, or allow more processes",
}
"""What to do about a full disk, a used-up quota, a file-size limit, limits of open files and of threads."""
_NO_MEMORY = os.strerror(errno.ENOMEM)
STARVED = (*map(os.strerror, (errno.EMFILE, errno.ENFILE, errno.EAGAIN)), _NO_MEMORY)
"""Messages of a process that is out of memory, threads or open files. A file that it fails to read is not damaged."""
_NAME_TAKEN = "another file has that name: move it away, or choose another run.dir"
PATH_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EROFS), "choose a run.dir and inputs for which you have the permissions"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), _NAME_TAKEN),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link that leads back to itself, or name another path",
}
"""What to do about an error of a path."""
_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE)
"""Errors of a path whose file system cannot do what every other can, or has failed."""
_FIRST_LINE = "rarec ended with an error that it did not expect.\n"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""The signals that batch systems send before they take a machine away."""
crash_context: dict[str, Path] = {}
"""For the report of a crash: `configuration`, the file of this command's run, and `directory`, its `run.dir`."""


def guarded(command: Callable[[], object]) -> None:
    """Call a command; whatever ends it early becomes one line on standard error and an exit code.

    | code | reason |
    | --- | --- |
    | 0 | done; or a signal asked training to stop, and it saved a checkpoint: a batch system sees a job that obeyed |
    | 2 | bad input, a full disk, a refused file: the line names it and a remedy |
    | 70 | an unexpected error: the line names the stage and the file with the traceback |
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


def print_from_any_rank(line: str) -> None:
    """Print one line to standard error, whichever rank this is."""
    print(line, file=sys.stderr, flush=True)


def _exit_code(command: Callable[[], object], signals: "_Signals") -> int | None:
    try:
        signals.listen()
        crash_context.clear()
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


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list of the signals to stop that have arrived within the context; they have no other effect.

    With the first, the step ends, a checkpoint is written, and the same command resumes.
    """
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Signals:
    """The signals that end a command, wherever it is: raised, so that nothing half-written stays behind.

    Attributes:
        cause: what was raised; libraries turn it into errors of their own, such as `Query interrupted`.
    """

    def __init__(self) -> None:
        defaults = (signal.SIG_DFL, signal.default_int_handler)  # one that is ignored, as by nohup, stays so
        ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._numbers = [number for number in ending if signal.getsignal(number) in defaults]
        self._process = os.getpid()
        self._since = 0.0
        self.cause: BaseException | None = None

    def listen(self) -> None:
        sys.unraisablehook = partial(self._send_again, sys.unraisablehook)
        for number in self._numbers:
            signal.signal(number, self._raise)

    def ignore(self) -> None:
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork has nothing to tidy up
            os._exit(SIGNALLED + number)
        impatient = number == signal.SIGINT and time.monotonic() - self._since > AGAIN
        if self.cause is not None and not impatient:  # batch systems and launchers repeat a signal
            return
        self._since = time.monotonic()
        self.cause = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
        raise self.cause

    def _send_again(self, otherwise: Callable[[Any], object], ignored: Any) -> None:
        """Send a signal again that was raised in a destructor, where Python ignores every exception."""
        if self.cause is None or ignored.exc_value is not self.cause:
            otherwise(ignored)
            return
        number = self.cause.number if isinstance(self.cause, Terminated) else signal.SIGINT
        self.cause = None
        threading.Timer(SWALLOWED, os.kill, (self._process, number)).start()


def _report(error: BaseException) -> int:
    """Print one line about what ended a command, and nothing else; return the exit code."""
    # Errors of destructors and of Python's shutdown follow from the error that is reported.
    sys.unraisablehook = lambda _: None  # until `inert_streams` ends
    atexit.register(lambda: setattr(sys, "stderr", None))
    own_rank = 0
    with suppress(UserError):  # the variable that holds it may be what is wrong
        own_rank = rank()
    if isinstance(error, OutputClosed):
        return SIGNALLED + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt | Terminated | Stopped):
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        if own_rank == 0:
            print_from_any_rank(f"{reason}; run the same command to resume")
        number = error.number if isinstance(error, Terminated) else signal.SIGINT
        return 0 if isinstance(error, Stopped) else SIGNALLED + number
    starved = any(text in str(error) for text in STARVED)
    message = str(error) if isinstance(error, UserError) and not starved else machine_trouble(error)
    if own_rank == 0 or not getattr(error, "shared", False):
        line = message or _crash_line(error, own_rank)
        print_from_any_rank(f"error: rank {own_rank}: {line}" if own_rank else f"error: {line}")
    return EXIT_CODE if message else CRASHED


# ---- errors of the machine, and reports of errors of the program, whose traceback goes into a file


def machine_trouble(error: BaseException) -> str | None:
    """Return the message for an error of the machine, such as a full disk; None for an error of the program."""
    path = str(error.filename) if isinstance(error, OSError) and error.filename else ""
    where = f": {path}" if path else "".join(f", {note}" for note in getattr(error, "__notes__", [])[:1])
    text = str(error).replace("can't start new thread", os.strerror(errno.EAGAIN))
    for number, remedy in EXHAUSTED.items():  # in the text: safetensors, DuckDB and Arrow raise exceptions of their own
        if os.strerror(number) in text:
            return in_short(f"{os.strerror(number)}{where}") + f"\n  -> {remedy}, then run the same command again"
    if not isinstance(error, OSError):
        return None
    number = errno.EACCES if isinstance(error, PermissionError) else error.errno or 0
    if number in PATH_REMEDIES:
        return in_short(f"{error.strerror or error}{where}") + f"\n  -> {PATH_REMEDIES[number]}"
    if number in _REFUSED and path:
        return in_short(f"{error.strerror}{where}") + "\n  -> choose another place: the file system there refuses that"
    if number == errno.ENOENT and not path:  # as `Path.cwd` raises it
        return "the current directory does not exist any more\n  -> cd to one that does"
    return None


def _crash_line(error: BaseException, rank: int) -> str:
    """Write the traceback of an error to a file; return the line for the user."""
    stage = _stage(error)
    reason = in_short(f"{type(error).__name__}: {error}".strip(": ").replace("\n", " "))
    # PyTorch and Arrow have errors of their own for a lack of memory.
    in_need = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or _NO_MEMORY in str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    head = f"version: {__version__}\ncommand: {shlex.join(map(redacted, sys.argv))}\nstage: {stage}\n"
    head += f"configuration: {crash_context.get('configuration', 'none')}\n\n"
    report = _FIRST_LINE + redacted(head + "".join(traceback.format_exception(error)))
    _free(error)  # what the failed frames hold: memory and open files, which writing needs
    path = _write(report, f"crash-rank{rank}.txt" if rank else CRASH)
    raised = f"raised in {place.filename}, line {place.lineno}; its traceback cannot be written"
    where = f"the traceback is in {path}" if path else raised
    remedy = _LESS_MEMORY if in_need else "run the same command to resume; if it fails again, report it with this"
    return f"{stage}: {reason} ({where}) -> {remedy}"


def _stage(error: BaseException) -> str:
    """Return the label of the stage that was being made; the command if none was."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        label = getattr(frame.f_locals.get("self"), "label", None)
        if frame.f_code.co_name == "make" and label:
            return str(label)
    program = Path(sys.argv[0]).name
    return " ".join(["rarec", *sys.argv[1:2]]) if program in ("rarec", "__main__.py") else program


def _free(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _write(report: str, name: str) -> Path | None:
    """Write the report to `run.dir`, or else to a temporary file; return the path, None if neither can be written."""
    paths = [Path(tempfile.gettempdir(), f"rarec-crash-{os.getpid()}.txt")]
    if "directory" in crash_context:
        paths.insert(0, crash_context["directory"] / name)
    for path in paths:
        try:  # a file of the user's with that name stays
            own = not os.path.lexists(path) or path.read_text(errors="replace").startswith(_FIRST_LINE)
            if own and path.parent.is_dir():
                write_text(path, inert(report))
                return path
        except (OSError, ValueError, UserError):  # as in /proc
            continue
    return None


# ---- the environment variables that a launcher (`accelerate launch`, torchrun, SLURM) sets


def rank() -> int:
    """Return the rank of this process among those that a launcher started.

    Raises:
        UserError: the variable holds no rank.
    """
    return _number("RANK", 0, MOST_RANKS - 1)


def world_size() -> int:
    """Return the number of processes that a launcher started.

    Raises:
        UserError: the variable holds no such number.
    """
    return _number("WORLD_SIZE", 1, MOST_RANKS)


def check_launcher() -> None:
    """Check the variables together, before anything is done.

    Raises:
        UserError: naming the variable that makes no sense.
    """
    _number("MASTER_PORT", 0, _LAST_PORT)
    for name in ("RANK", "LOCAL_RANK"):
        if _number(name, 0, MOST_RANKS - 1) >= world_size():
            raise _refusal(name, f"WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set, which means 1')}")


def _number(name: str, default: int, most: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("0|[1-9][0-9]{0,9}", text) or int(text) > most:
        raise _refusal(name, f"it must be a number from 0 to {most:,}")
    return int(text)


def _refusal(name: str, reason: str) -> UserError:
    problem = f"the environment variable {name} is {os.environ.get(name, 'not set')!r}: {reason}"
    return UserError(problem, f"unset {name}, or start several processes with accelerate launch, which sets it")
