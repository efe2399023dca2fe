"""Processes in tests: the forks of a process, and a process that kills itself."""

import os
import signal
import sys

import psutil


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Return the living forks of a process; other children (Spark's JVM, a fork server) have other command lines."""
    children = [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if child.cmdline() == process.cmdline()]


def be_killed_at_rename(number: int) -> None:
    """Kill this process with SIGKILL right before its nth rename from now; never if `number` is below 1."""
    left = [number]

    def count(event: str, _: object) -> None:
        if event == "os.rename":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
