"""`rarec serve` as a process."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.pages import ROOT


class Service:
    """A service that listens.

    Args:
        process: `rarec serve`.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.lines = process, list[str]()
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._listening.wait(90), self.lines
        self.url = next(line["text"] for line in self.events("listening")).rstrip("/")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return what it has said, of one kind."""
        said = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [line for line in said if line["event"] == kind]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if '"listening"' in line:
                self._listening.set()
        self._listening.set()


@contextmanager
def service(*arguments: str | Path, hidden: Sequence[str] = ()) -> Iterator[Service]:
    """Start a service at a free port, and end it.

    Args:
        arguments: of `rarec serve`.
        hidden: modules that it cannot import.
    """
    words = ["rarec", *command(*arguments, "--port", "0")[3:]]
    code = f"import sys; sys.modules.update(dict.fromkeys({list(hidden)})); sys.argv = {words}"
    start = [sys.executable, "-c", f"{code}; from rarec.__main__ import main; main()"]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True, env=own()) as process:
        try:
            yield Service(process)
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()


def command(*arguments: str | Path) -> list[str]:
    """Return the words of `rarec serve`."""
    return [sys.executable, "-m", "rarec", "serve", *map(str, arguments)]


def own() -> dict[str, str]:
    """Return an environment for one thread, without the network."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
