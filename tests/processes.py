"""Processes in tests: which a process has forked, and one that is killed on purpose."""

import os
import signal
import sys

import psutil


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Its living forks: other children (Spark's JVM, a fork server) have command lines of their own."""
    children = [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if child.cmdline() == process.cmdline()]


def be_killed_at_rename(number: int) -> None:
    """Kill this process, as kill -9 does, when it is about to rename for the nth time from now; never, if below 1."""
    left = [number]

    def count(event: str, _: object) -> None:
        if event == "os.rename":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
