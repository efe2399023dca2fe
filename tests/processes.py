"""Processes in tests: the forks of a process, a process that kills itself, and what a killed one leaves."""

import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from rarec.storage.artefacts import BEGUN, MANIFEST, PROGRESS, write_sealed
from rarec.storage.directories import claim
from rarec.storage.files import read_json

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Return the living forks of a process; other children (Spark's JVM, a fork server) have other command lines."""
    children = [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if child.cmdline() == process.cmdline()]


def all_end(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Return whether all processes end in time. One that nobody has waited for yet has ended: not every init does."""
    deadline, left = time.monotonic() + seconds, list(processes)
    while left and time.monotonic() < deadline:
        left = [process for process in left if _lives(process)]
        time.sleep(0.02)
    return not left


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def be_killed_at_rename(number: int) -> None:
    """Kill this process with SIGKILL right before its nth rename from now; never if `number` is below 1."""
    left = [number]

    def count(event: str, _: object) -> None:
        if event == "os.rename":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def unfinish(directory: Path) -> None:
    """Turn a finished artefact into one whose process was killed right before it wrote the manifest."""
    manifest = read_json(directory / MANIFEST)
    claim(directory, [BEGUN, f"{PROGRESS}/"])
    write_sealed(directory / BEGUN, {name: manifest[name] for name in ("kind", "schema", "settings", "made_from")})
    (directory / MANIFEST).unlink()


def be_killed_at_change(number: int, root: Path) -> None:
    """Kill this process with SIGKILL right before its nth change to the files below a directory."""
    left = [number]

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and arguments[2] & _WRITES and str(arguments[0]).startswith(str(root))
        # shutil.rmtree names files relative to an open directory: the process changes no others
        if opened or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
