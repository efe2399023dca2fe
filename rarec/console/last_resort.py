"""The last resort: whatever ends a command early becomes one line on standard error and an exit code.

The imports of this module are light, so that an error while all else is imported ends in order as well.
"""

import atexit
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from rarec.console.crash import STARVED, crash_line, machine_trouble
from rarec.console.inert import OutputClosed, inert_streams
from rarec.errors import EXIT_CODE, Stopped, Terminated, UserError

WAITING = {"GOMP_SPINCOUNT": "1000"}
"""How long an OpenMP thread spins for the others before it sleeps. GNU's own default, milliseconds, takes the cores of
a busy machine; not spinning at all makes training an ID model 1.2 times slower (`tools/bench/waiting.py`)."""
SIGNALLED = 128
"""Exit code of a command ended by a signal, less the number of the signal: 130 for Ctrl-C, as a shell reports it."""
CRASHED = 70
"""Exit code after an error that rarec did not expect: EX_SOFTWARE of sysexits.h."""
AGAIN = 1.0
"""Seconds after which a second Ctrl-C interrupts the cleaning up as well."""
MOST_RANKS = 100_000
"""More processes than any machine runs: such a number is a mistake, and waiting for them all would never end."""
_LIMITS = {"RANK": MOST_RANKS - 1, "LOCAL_RANK": MOST_RANKS - 1, "WORLD_SIZE": MOST_RANKS, "MASTER_PORT": 65_535}
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


def _report(error: BaseException) -> int:
    """Print one line about what ended a command, and nothing else; return the exit code."""
    # Errors of destructors and of Python's shutdown follow from the error that is reported.
    sys.unraisablehook = lambda _: None  # until `inert_streams` ends
    atexit.register(lambda: setattr(sys, "stderr", None))
    if isinstance(error, OutputClosed):
        return SIGNALLED + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt | Terminated | Stopped):
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        if _rank() == 0:
            print_from_any_rank(f"{reason}; run the same command to resume")
        number = error.number if isinstance(error, Terminated) else signal.SIGINT
        return 0 if isinstance(error, Stopped) else SIGNALLED + number
    starved = any(text in str(error) for text in STARVED)
    message = str(error) if isinstance(error, UserError) and not starved else machine_trouble(error)
    own_rank = _rank()
    if own_rank == 0 or not getattr(error, "shared", False):
        line = message or crash_line(error, **crash_context, rank=own_rank)
        print_from_any_rank(f"error: rank {own_rank}: {line}" if own_rank else f"error: {line}")
    return EXIT_CODE if message else CRASHED


def _rank() -> int:
    """Return this process's rank; 0 if the variable that holds it makes no sense, which is the error to report."""
    try:
        return rank()
    except UserError:
        return 0


# ---- the environment variables that a launcher (`accelerate launch`, torchrun, SLURM) sets


def rank() -> int:
    """Return the rank of this process among those that a launcher started.

    Raises:
        UserError: the variable holds no rank.
    """
    return _number("RANK", 0)


def world_size() -> int:
    """Return the number of processes that a launcher started.

    Raises:
        UserError: the variable holds no such number.
    """
    return _number("WORLD_SIZE", 1)


def check_launcher() -> None:
    """Check the variables together, before anything is done.

    Raises:
        UserError: naming the variable that makes no sense.
    """
    _number("MASTER_PORT", 0)
    for name in ("RANK", "LOCAL_RANK"):
        if _number(name, 0) >= world_size():
            raise _refusal(name, f"WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set, which means 1')}")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("0|[1-9][0-9]{0,9}", text) or int(text) > _LIMITS[name]:
        raise _refusal(name, f"it must be a number from 0 to {_LIMITS[name]:,}")
    return int(text)


def _refusal(name: str, reason: str) -> UserError:
    problem = f"the environment variable {name} is {os.environ.get(name, 'not set')!r}: {reason}"
    return UserError(problem, f"unset {name}, or start several processes with accelerate launch, which sets it")
