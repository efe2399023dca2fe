"""The scratch folder and the commands of gpu.py: none runs for ever, and what fails is a figure."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tools.bench.measuring import Figure
from tools.bench.small_runs import ROOT, launched

LONGEST = 240
"""Seconds after which a command counts as hung."""


@dataclass(frozen=True)
class Place:
    """Where the checks run.

    Attributes:
        device: `cuda` or `cpu`.
        ranks: number of processes: one for each GPU.
        root: scratch folder with the configuration, the log and the language model.
        end: when commands must have ended, on the clock of `time.monotonic`.
        processes: every command that was started, whether it has ended or not.
    """

    device: str
    ranks: int
    root: Path
    end: float
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def config(self) -> Path:
        """The configuration of the small run."""
        return self.root / "config.yaml"

    @property
    def several(self) -> str:
        """The plain engine of several ranks."""
        return "ddp" if self.device == "cuda" else "cpu"

    def launched(self, script: str, run: str, *overrides: str, engine: str = "", ranks: int = 0) -> list[str]:
        """Return the command that starts a script on the device, on all ranks if no number is given."""
        ranks = ranks or self.ranks
        engine = engine or (self.several if ranks > 1 else "one")
        given = ["--config", str(self.config), f"run.dir={self.root / run}", f"run.device={self.device}", *overrides]
        return launched(engine, ranks, f"launch/{script}.py", *given)

    def run(self, command: Sequence[str]) -> None:
        """Run a command in the repository.

        Raises:
            Failed: it ended with another code than 0, or took too long; it and all that it started are gone.
        """
        left = min(LONGEST, self.end - time.monotonic())
        if left <= 0:
            raise Failed("no time left: give it more --minutes, or fewer checks by --only")
        with tempfile.TemporaryFile("w+") as output:
            process, why = self.started(command, output), ""
            try:
                process.wait(left)
            except subprocess.TimeoutExpired:
                why = f"it did not end within {left:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            text = output.read()
        if process.returncode:
            raise Failed(why or _reason(text), f"{' '.join(command)}\n{text}")

    def started(self, command: Sequence[str], output: IO[Any]) -> "subprocess.Popen[bytes]":
        """Start a command in the repository, in a session of its own; its output goes to a file."""
        shared = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=shared, stdout=output, stderr=output, start_new_session=True)
        self.processes.append(process)
        return process

    def stop(self, *_: object) -> None:
        """Kill every command that still runs, then interrupt this program.

        It is called by a signal, which does not reach commands in sessions of their own.
        """
        for process in self.processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGKILL)
        raise KeyboardInterrupt

    def figures(self, jobs: Mapping[str, Callable[[], list[Figure] | None]]) -> list[Figure]:
        """Return the figures of independent jobs, by name; most of a small training's time is its start.

        What fails is a figure too.
        """
        with ThreadPoolExecutor(4 if self.device == "cuda" else 1) as pool:
            return [figure for own in pool.map(tried, jobs, jobs.values()) for figure in own]

    def copied(self, name: str, without: Sequence[str] = ("train",)) -> Path:
        """Return a new copy of the run, with what is made before."""
        copy = self.root / name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.root / "run", copy)
        for stage in without:
            shutil.rmtree(copy / stage, ignore_errors=True)
        return copy


class Failed(Exception):
    """A command failed: the reason in a line, and its whole output."""


def tried(name: str, work: Callable[[], list[Figure] | None]) -> list[Figure]:
    """Return the figures of a check, or one that says why it failed."""
    try:
        return work() or []
    except Exception as error:  # the others go on
        print(f"{name}: {error.args[-1] if error.args else error!r}", file=sys.stderr)
        why = error.args[0] if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
        return [Figure(name, str(why)[:160], "runs", met=False)]


def _reason(text: str) -> str:
    """Return the line of a command's output that says what failed: its own, not the launcher's below it."""
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if "error:" in line), lines[-1]).strip()
