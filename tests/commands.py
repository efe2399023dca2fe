"""Run `rarec` commands quickly, and in odd surroundings: each in a fork of a process that has imported everything."""

import atexit
import ctypes
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, TextIO

import psutil

from tests.forks import START

TIMEOUT = 120.0
"""Seconds after which a command is said to hang."""
PR_SET_PDEATHSIG = 1
CAPABILITIES = 0x20080522, 0b1110
"""Version of the structures of `capset`, and root's rights to ignore permissions and owners."""


@dataclass(frozen=True)
class Command:
    """One `rarec` command, and what surrounds it.

    Attributes:
        words: arguments of `rarec`.
        cwd: current directory.
        environment: changes to the environment; None removes a variable.
        limits: soft limits by their names in `resource`; RLIMIT_AS is what comes on top of the memory at the start.
        stdout: `pipe`, `closed`, `ascii` (its encoding), `full` (no byte can be written) or `broken` (a closed pipe).
        umask: of new files; None leaves it as it is.
        obeys: whether root gives up its right to ignore permissions.
        lost_cwd: whether the current directory is deleted before the command starts.
        kill: signal to send to itself, and when: `(signal, renames, path)`: before its nth rename, or before the first
            rename to a path with this end.
        kill_after: signal to send, and after how many seconds.
        timeout: in seconds.
    """

    words: list[str]
    cwd: str
    environment: dict[str, str | None] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    stdout: str = "pipe"
    umask: int | None = None
    obeys: bool = False
    lost_cwd: bool = False
    kill: tuple[int, int, str] | None = None
    kill_after: tuple[int, float] | None = None
    timeout: float = TIMEOUT

    @property
    def line(self) -> str:
        """The command as typed."""
        return "rarec " + " ".join(self.words)


@dataclass(frozen=True)
class Outcome:
    """The end of a command.

    Attributes:
        code: exit code; -N where signal N ended it; None where it hung.
        stdout: what it printed.
        stderr: its messages.
        cpu: seconds of CPU time.
    """

    code: int | None
    stdout: str
    stderr: str
    cpu: float


def run_command(command: Command) -> Outcome:
    """Run a command to its end; kill it, with all that it has started, at its moment or after the time limit."""
    pipes = [START.Pipe(duplex=False) for _ in range(2)]  # not files: their size is limited in some examples
    process = START.Process(target=_become, args=(command, *(writing for _, writing in pipes)))
    process.start()
    group, started = psutil.Process(process.pid), time.monotonic()
    moments = [(command.timeout, signal.SIGKILL)]
    if command.kill_after:
        moments.insert(0, (command.kill_after[1], command.kill_after[0]))
    texts, cpu = [b"", b""], 0.0
    for reading, writing in pipes:
        writing.close()
        os.set_blocking(reading.fileno(), False)
    alive = True
    while alive:
        alive = process.is_alive()
        texts = [text + _read(reading.fileno()) for text, (reading, _) in zip(texts, pipes, strict=True)]
        with suppress(psutil.Error):
            cpu = sum(group.cpu_times()[:4])
        if moments and time.monotonic() - started > moments[0][0]:
            _send(process.pid, moments.pop(0)[1], group=not moments)
        time.sleep(0.01)
    _send(process.pid, signal.SIGKILL, group=True)  # workers that a killed process leaves
    stdout, stderr = (text.decode(errors="backslashreplace") for text in texts)
    return Outcome(process.exitcode if moments else None, stdout, stderr, cpu)


def _read(handle: int) -> bytes:
    parts = []
    with suppress(BlockingIOError):
        while part := os.read(handle, 2**16):
            parts.append(part)
    return b"".join(parts)


def _send(child: int | None, number: int, group: bool) -> None:
    assert child
    with suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(child, number)


def _become(command: Command, out: Connection, err: Connection) -> NoReturn:
    """Turn this forked process into `python -m rarec WORDS`."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a command that hangs must not outlive the tests
    code = 1
    try:
        _surround(command, out.fileno(), err.fileno())
        sys.argv = ["rarec", *command.words]
        runpy.run_module("rarec", run_name="__main__", alter_sys=False)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code)


def _leave(code: int) -> NoReturn:
    """End this process as the interpreter does: 120 where standard output cannot be flushed."""
    atexit._run_exitfuncs()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        code = 120
    if sys.stderr is not None:
        sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _surround(command: Command, out: int, err: int) -> None:
    """Set up streams, environment and limits."""
    os.dup2(err, 2)
    _STDOUT[command.stdout](out)
    for handle in (out, err):
        os.close(handle)
    encoding = "ascii" if command.stdout == "ascii" else "utf-8"
    sys.stderr = _stream(2, encoding, "backslashreplace", buffering=1)
    sys.stdout = None if command.stdout == "closed" else _stream(1, encoding, "strict")
    os.chdir(command.cwd)
    for name, value in command.environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if command.umask is not None:
        os.umask(command.umask)
    if command.obeys:
        _obey_permissions()
    if command.lost_cwd:
        lost = Path(command.cwd, "lost")
        lost.mkdir()
        os.chdir(lost)
        lost.rmdir()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if command.kill:
        _kill_at_rename(*command.kill)
    for limit, most in command.limits.items():
        number = getattr(resource, limit)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(number, (most + now * (limit == "RLIMIT_AS"), resource.getrlimit(number)[1]))


def _obey_permissions() -> None:
    """Give up root's right to ignore permissions."""
    version, rights = CAPABILITIES
    libc, header, sets = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for number in range(3):  # effective, permitted, inheritable
        sets[number] &= ~rights
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _stream(number: int, encoding: str, errors: str, buffering: int = -1) -> TextIO:
    return os.fdopen(number, "w", buffering, encoding=encoding, errors=errors, closefd=False)


def _broken(out: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.close(writing)


_STDOUT: dict[str, Callable[[int], object]] = {
    "pipe": lambda out: os.dup2(out, 1),
    "ascii": lambda out: os.dup2(out, 1),
    "full": lambda out: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
    "closed": lambda out: os.close(1),
    "broken": _broken,
}


def _kill_at_rename(number: int, renames: int, path: str) -> None:
    """Send a signal to this process before its nth rename, or before the first to a path with this end."""
    left = [renames]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and (not path or str(arguments[1]).endswith(path)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)

    sys.addaudithook(count)
