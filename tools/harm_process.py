"""Run `rarec` commands quickly, in odd surroundings: forked from a process that has imported everything once.

`Server` starts this file as a script. Each line on its standard input is a command as JSON; it forks, runs the command
in the child as `python -m rarec` does, and answers with the exit code and the CPU time.
"""

import atexit
import ctypes
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

PRELOADED = (
    "rarec.cli",
    "rarec.stages.run",
    "rarec.stages.variant_training",
    "rarec.evaluation.evaluator",
    "rarec.stages.export",
    "rarec.stages.shard_content",
    "rarec.data.engines.duckdb_engine",
    "rarec.data.preparation.pipeline",
    "rarec.ids.trainer",
    "rarec.models.language_model",
    "rarec.report.html",
    "rarec.training.loop",
    "rarec.bundle.users",
    "rarec.bundle.realign",
    "rarec.export.onnx",
    "transformers.models.bert.modeling_bert",
    "torch.distributed.nn",
)
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
        kill: signal to send to itself, and when: `[signal, renames, path]`: before its nth rename, or before the first
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


@dataclass(frozen=True)
class Outcome:
    """The end of a command.

    Attributes:
        code: exit code; -N where signal N ended it; None where it hung.
        stdout: what it printed.
        stderr: its messages.
        cpu: seconds of CPU time.
        wall: seconds.
    """

    code: int | None
    stdout: str
    stderr: str
    cpu: float
    wall: float


class Server:
    """A process that has imported everything, and forks one that runs a command at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, text=True
        )

    def run(self, command: Command) -> Outcome:
        """Run a command to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asdict(command)), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """Fork for each line on standard input; answer with its outcome."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that is imported may print among the answers
    for module in PRELOADED:
        import_module(module)
    import_module("torch").set_num_threads(1)
    for line in sys.stdin:
        command = Command(**json.loads(line))
        out, err = os.pipe(), os.pipe()  # not files: their size is limited in some examples
        child = os.fork()
        if not child:
            answers.close()
            _become(command, out[1], err[1])
        for _, writing in (out, err):
            os.close(writing)
        print(json.dumps(asdict(_wait(child, command, out[0], err[0]))), file=answers, flush=True)


def _wait(child: int, command: Command, out: int, err: int) -> Outcome:
    """Wait for a child; kill it, with what it has started, at its moment or after the time limit."""
    texts = {out: b"", err: b""}
    for handle in texts:
        os.set_blocking(handle, False)
    signals = [(command.timeout, signal.SIGKILL)]
    if command.kill_after:
        signals.insert(0, (command.kill_after[1], signal.Signals(command.kill_after[0])))
    started, hung = time.monotonic(), False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        for handle in texts:
            while more := _read(handle):
                texts[handle] += more
        if done:
            for handle in texts:
                os.close(handle)
            _send(child, signal.SIGKILL, group=True)  # workers that a killed process leaves
            stdout, stderr = (text.decode(errors="backslashreplace") for text in texts.values())
            code = None if hung else os.waitstatus_to_exitcode(status)
            return Outcome(code, stdout, stderr, usage.ru_utime + usage.ru_stime, time.monotonic() - started)
        if signals and time.monotonic() - started > signals[0][0]:
            hung = len(signals) == 1
            _send(child, signals.pop(0)[1], group=hung)
        time.sleep(0.002)


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 2**16)
    except BlockingIOError:
        return b""


def _send(child: int, number: signal.Signals, group: bool) -> None:
    with suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(child, number)


def _become(command: Command, out: int, err: int) -> None:
    """Turn this forked process into `python -m rarec WORDS`; does not return."""
    os.setpgid(0, 0)
    _end_with_parent()
    code = 1
    try:
        _surround(command, out, err)
        sys.argv = ["rarec", *command.words]
        runpy.run_module("rarec", run_name="__main__", alter_sys=False)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        _leave(code)


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends: a command that hangs must not outlive the tool."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave(code: int) -> None:
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
    encoding = "ascii" if command.stdout == "ascii" else "utf-8"
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # not the pipe of commands
    sys.stderr = _stream(2, encoding, "backslashreplace", buffering=1)
    closed = command.stdout == "closed"
    sys.stdout = None if closed else _stream(1, encoding, "strict")
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


def _full(out: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def _broken(out: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


_STDOUT: dict[str, Callable[[int], object]] = {
    "pipe": lambda out: os.dup2(out, 1),
    "ascii": lambda out: os.dup2(out, 1),
    "full": _full,
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


if __name__ == "__main__":
    serve()
