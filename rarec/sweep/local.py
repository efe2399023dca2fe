"""A sweep on this machine: one run after the other, each a process of its own, so that none takes others with it."""

import ctypes
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rarec.config.load import format_override
from rarec.errors import Stopped
from rarec.files import lock_file, try_lock
from rarec.sweep.expand import Sweep, SweepRun
from rarec.sweep.state import first_to_do, state_of
from rarec.training.signals import StopSignals

LOG = "sweep.log"
"""In a run's directory: what its process said, each sitting behind the command that began it."""
_LOCK = ".sweep.lock"
_LOOK = 0.1
"""Seconds between looks at a run in progress."""
_PR_SET_PDEATHSIG = 1
Say = Callable[[str], None]
Show = Callable[[str], None]


def run_locally(sweep: Sweep, runs: Sequence[SweepRun], say: Say, show: Show) -> list[str]:
    """Make what is not done of these runs, one line told of each.

    Args:
        sweep: that they are of.
        runs: in the order in which they are made.
        say: tells the user a line that stays.
        show: what the run in progress is at, for a line that does not stay.

    Returns:
        A line for each run that failed: its name, how it ended, and the last that it said.

    Raises:
        Stopped: by SIGTERM or SIGUSR1; the run in progress has saved and ended.
        KeyboardInterrupt: by Ctrl-C; likewise.
    """
    failed = []
    with StopSignals().recorded() as signals:
        for run in runs:
            outcome = _run(sweep, run, signals, say, show)
            if outcome is not None:
                failed.append(f"{run.label}: {outcome}")
    return failed


def command_of(sweep: Sweep, run: SweepRun) -> list[str]:
    """What makes a run, by itself."""
    overrides = [format_override(field, value) for field, value in run.overrides.items()]
    return ["run", str(sweep.base), *overrides, "--stages", " ".join(sweep.stages)]


def last_words(log: Path) -> str:
    """The last line of a log; if it is a remedy, the problem stands before it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " ".join(lines[-2:] if lines[-1:] and lines[-1].startswith("->") else lines[-1:])


def _run(sweep: Sweep, run: SweepRun, signals: StopSignals, say: Say, show: Show) -> str | None:
    """Make one run; None if it is done, else how it ended."""
    if first_to_do(run.config, sweep.stages) is None:
        say(_line(run, sweep.stages[-1], 0, "skipped, done before"))
        return None
    with _alone(run, signals, say) as handle:
        started = time.monotonic()
        code = _sit(sweep, run, handle, signals, lambda stage: show(_line(run, stage, time.monotonic() - started, "")))
        state, stage = state_of(run, sweep.stages)
        done = state == "done"
        say(_line(run, stage, time.monotonic() - started, "done" if done else "failed"))
    return None if done else f"{_ending(code)}: {last_words(run.directory / LOG)}"


@contextmanager
def _alone(run: SweepRun, signals: StopSignals, say: Say) -> Iterator[int]:
    """Hold the run against another sweep, or what a killed one has left running; yields the handle that holds it."""
    with lock_file(run.directory / _LOCK) as handle:
        told = False
        while not try_lock(handle):
            if not told:
                say(f"{run.label}: another process is at it, waiting for it to end")
            told = True
            _stop_if_told(signals)
            time.sleep(_LOOK)
        yield handle


def _sit(sweep: Sweep, run: SweepRun, held: int, signals: StopSignals, show: Show) -> int:
    """One process from its start to its end; returns its exit code, negative for a signal."""
    command = [sys.executable, "-m", "rarec", *command_of(sweep, run)]
    with (run.directory / LOG).open("a") as log:
        log.write(f"\n$ rarec {shlex.join(command[3:])}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is the sweep's, which has the run save first
            pass_fds=[held],  # so that the run is held until its process ends, whatever befalls the sweep
            preexec_fn=_end_with_the_sweep,
        )
    try:
        return _watched(process, run, sweep.stages, signals, show)
    except (KeyboardInterrupt, Stopped):
        _end(process)
        raise


def _watched(
    process: "subprocess.Popen[bytes]", run: SweepRun, stages: Sequence[str], signals: StopSignals, show: Show
) -> int:
    looked = 0.0
    while process.poll() is None:
        _stop_if_told(signals)
        if time.monotonic() - looked > 1:
            show(first_to_do(run.config, stages) or stages[-1])
            looked = time.monotonic()
        time.sleep(_LOOK)
    return process.returncode


def _stop_if_told(signals: StopSignals) -> None:
    if signals.received:
        raise Stopped("the sweep was stopped by a signal")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Have a run save and end; another Ctrl-C does not wait for that."""
    process.terminate()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()


def _end_with_the_sweep() -> None:
    """In the new process: a sweep that is killed takes its run with it, which saves and ends. Linux alone has this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _line(run: SweepRun, stage: str, seconds: float, outcome: str) -> str:
    return "  ".join(part for part in (run.label, stage, f"{seconds:.0f} s" if seconds else "", outcome) if part)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"{signal.Signals(-code).name}" + (", as where memory has run out" if code == -signal.SIGKILL else "")
