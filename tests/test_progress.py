"""Progress of long loops: a bar that fits a terminal of 80 columns, sparse lines in a file, nothing for short loops."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from rarec.config import VARIANTS
from rarec.console.progress import SPARSE, Task

LONGEST = """
import time
from rarec.console.progress import Task
shown = Task("{title}", 20000, 12000, patience=0.0)
shown.update(12345, "loss 12.345, 9999 tokens/s, 9.9 GB")
time.sleep(0.5)
shown.end()
"""


def on_a_terminal(code: str) -> str:
    """Run Python on a terminal of 80 columns; return what it showed, without control sequences."""
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:  # the other end is closed
                break
            shown += part
    os.close(main)
    assert process.returncode == 0, shown.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_the_bar_of_a_training_fits_80_columns():
    title = max(VARIANTS, key=len)
    lines = re.split(r"[\r\n]+", on_a_terminal(LONGEST.format(title=title)))
    bar = next(line.rstrip() for line in lines if "12345/20000" in line)
    assert bar.startswith(f"{title} ")
    assert "12345/20000 loss 12.345, 9999 tokens/s, 9.9 GB" in bar
    assert max(map(len, lines)) <= 80
    assert re.search(r" \S+:\S+$", bar), "the time left"


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that have passed."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_in_a_file_are_sparse_and_name_steps_facts_and_the_time_left(clock, capsys):
    shown = Task("per_layer", 100)
    for step in range(1, 101):
        clock[0] += 1.0
        shown.update(step, f"loss {100 - step}")
    shown.end()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "per_layer: 16/100, loss 84, 0:01:24 left"
    assert lines[-1] == "per_layer: 100/100, loss 0"
    assert len(lines) <= 100 / SPARSE + 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_short_loop_and_another_rank_show_nothing(rank, clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    shown = Task("per_layer", 100)
    for step in range(1, 100):
        clock[0] += 0.1 if rank == "0" else 10.0
        shown.update(step)
    shown.end()
    assert capsys.readouterr().err == ""
