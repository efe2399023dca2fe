"""Run a sweep on this machine: one run after the other, each in its own process, so that a crash ends one run only."""

import ctypes
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rarec.cluster.definition import Sweep, SweepRun, first_to_do, state_of
from rarec.config.load import format_override
from rarec.console.inert import inert
from rarec.console.last_resort import stop_signals
from rarec.errors import Stopped
from rarec.storage.files import make_directory

LOG = "sweep.log"
"""File in a run's directory: the output of its processes, each after the command that started it."""
_STATE_SECONDS = 2.0
"""Seconds between looks at the stage of the current run, and for a signal."""
_PR_SET_PDEATHSIG = 1
Say = Callable[[str], None]


def run_locally(sweep: Sweep, runs: Sequence[SweepRun], say: Say, show: Say) -> list[str]:
    """Run what is not done of these runs; print one line for each.

    Args:
        sweep: sweep that the runs belong to.
        runs: runs, in order.
        say: prints a line to the user.
        show: replaces the status line with what the current run is doing.

    Returns:
        A line for each run that failed: its label, how it ended, and the end of its log.

    Raises:
        Stopped: SIGTERM or SIGUSR1 came; the current run has saved a checkpoint and ended.
        KeyboardInterrupt: Ctrl-C; likewise.
    """
    failed = []
    with stop_signals() as signals:
        for run in runs:
            outcome = _run(sweep, run, signals, say, show)
            if outcome is not None:
                failed.append(f"{run.label}: {outcome}")
    return failed


def list_states(sweep: Sweep, runs: Sequence[SweepRun]) -> list[str]:
    """Return a line for each run: its label, its state and, if it is begun, its next stage."""
    width = max(len(run.label) for run in runs)
    states = [state_of(run, sweep.stages) for run in runs]
    return [
        f"{run.label:{width}}  {state}" + (f", next: {stage}" if state == "begun" else "")
        for run, (state, stage) in zip(runs, states, strict=True)
    ]


def run_arguments(sweep: Sweep, run: SweepRun) -> list[str]:
    """Return the arguments of the `rarec` command that makes a run."""
    overrides = [format_override(field, value) for field, value in run.overrides.items()]
    return ["run", str(sweep.base), *overrides, "--stages", " ".join(sweep.stages)]


def last_message(log: Path) -> str:
    """Return the last line of a log; if that is a remedy, the problem before it as well."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " ".join(lines[-2:] if lines[-1:] and lines[-1].startswith("->") else lines[-1:])


def _run(sweep: Sweep, run: SweepRun, signals: Sequence[int], say: Say, show: Say) -> str | None:
    """Make one run; return None if it is done, otherwise how it ended."""
    if first_to_do(run.config, sweep.stages) is None:
        say(f"{run.label}  {sweep.stages[-1]}  skipped, done before")
        return None
    started = time.monotonic()
    process = _start(run, run_arguments(sweep, run))
    try:
        while process.poll() is None:
            if signals:
                raise Stopped("the sweep was stopped by a signal")
            show(f"{run.label}  {first_to_do(run.config, sweep.stages) or sweep.stages[-1]}  {_since(started)}")
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STATE_SECONDS)
    except (KeyboardInterrupt, Stopped):
        _terminate(process)
        raise
    state, stage = state_of(run, sweep.stages)
    say(f"{run.label}  {stage}  {_since(started)}  {'done' if state == 'done' else 'failed'}")
    return None if state == "done" else f"{_describe_exit(process.returncode)}: {last_message(run.directory / LOG)}"


def _since(started: float) -> str:
    return f"{time.monotonic() - started:.0f} s"


def _start(run: SweepRun, arguments: list[str]) -> "subprocess.Popen[bytes]":
    """Start the process that makes a run; its output goes to the run's log.

    Where another one works on the run, of another sweep or of one that was killed, its stages wait for each other.
    """
    path = run.directory / LOG
    make_directory(path.parent)
    with path.open("a", errors="replace") as log:
        log.write(inert(f"\n$ rarec {shlex.join(arguments)}\n"))
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "rarec", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which then lets the run save a checkpoint
            preexec_fn=_terminate_with_parent,
        )


def _terminate(process: "subprocess.Popen[bytes]") -> None:
    """Let a run save a checkpoint and end; a second Ctrl-C kills it."""
    process.terminate()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()


def _terminate_with_parent() -> None:
    """Have the kernel terminate the new process when the sweep is killed; it saves a checkpoint. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"{signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
