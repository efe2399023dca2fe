"""Which processes a process has forked."""

import psutil


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Its living forks: other children (Spark's JVM, a fork server) have command lines of their own."""
    children = [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if child.cmdline() == process.cmdline()]
