"""`rarec bench`, and the rows of the harness in tools/."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from select import select

import pytest

from rarec import cli
from rarec.entry import open_run
from rarec.errors import UserError
from tests.test_stage import state
from tools.bench import gpu_place
from tools.bench.gpu_place import Place
from tools.bench.measuring import Figure, Row


def test_bench_says_where_a_steps_time_goes_and_writes_nothing(finished, capsys):
    root = open_run(finished).root
    before = state(root)
    cli.bench(finished, steps=2)
    out = capsys.readouterr().out
    phases = re.findall(r"^(waiting for data|forward|losses|backward|update) .* ms, (\d+)%$", out, re.MULTILINE)
    assert len(phases) == 5
    assert sum(int(share) for _, share in phases) == pytest.approx(100, abs=3)
    assert re.search(r"^step .* tokens/s$", out, re.MULTILINE)
    assert re.search(r"^padding +\d+% of all positions$", out, re.MULTILINE)
    assert re.search(r"^language model alone .*%$", out, re.MULTILINE)
    assert state(root) == before


def test_every_variant_can_be_measured_and_another_name_is_refused(finished, capsys):
    cli.bench(finished, variant="text_only", steps=1)
    assert "forward" in capsys.readouterr().out
    with pytest.raises(UserError, match="--variant nothing") as error:
        cli.bench(finished, variant="nothing")
    assert "text_only" in error.value.remedy


def test_without_shards_the_command_that_makes_them_is_named(finished, tmp_path):
    with pytest.raises(UserError) as error:
        cli.bench(finished, [f"run.dir={tmp_path / 'none'}"])
    assert "rarec" in error.value.remedy


def test_a_row_of_the_harness_is_judged_by_its_ratio():
    fast, slow = Row.least("a", 30, 10, 2, "users/s"), Row.most("b", 30, 10, 2, "s")
    assert (fast.ratio, fast.met, slow.met) == (3, True, False)
    assert replace(slow, ratio=2).met
    assert not replace(fast, ratio=1.99).met
    assert fast.figure().figure == "30 / 10 users/s = 3.00"


@pytest.fixture
def place(tmp_path):
    return Place("cpu", 1, tmp_path, time.monotonic() + 60)


def python(place, code):
    return lambda: place.run([sys.executable, "-c", code]) or []


def test_a_check_of_a_gpu_that_fails_or_hangs_is_a_figure_and_the_others_go_on(place, monkeypatch):
    """The reason is the command's own line, not that of its launcher."""
    monkeypatch.setattr(gpu_place, "LONGEST", 3)
    jobs = {
        "fails": python(place, "raise SystemExit('error: no file -> make it\\nTraceback of a launcher')"),
        "hangs": python(place, "import time; time.sleep(99)"),
        "has a defect": lambda: [][0],
        "works": lambda: [Figure("loss", "1.0")],
    }
    figures = place.figures(jobs)
    assert [(row.what, row.met) for row in figures] == [*((name, False) for name in list(jobs)[:3]), ("loss", None)]
    assert figures[0].figure == "error: no file -> make it"
    assert "3 s" in figures[1].figure
    assert "IndexError" in figures[2].figure


def test_a_signal_ends_all_that_runs(place):
    """The command's own children end as well: a pipe is closed by the last process that holds it."""
    command = "import subprocess; subprocess.run(['sh', '-c', 'echo started; sleep 99'])"
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reading, os.fdopen(write, "wb") as writing:
        process = place.started([sys.executable, "-c", command], writing)
        writing.close()
        assert reading.readline() == b"started\n"
        with pytest.raises(KeyboardInterrupt):
            place.stop()
        assert process.wait(10) == -signal.SIGKILL
        closed, _, _ = select([reading], [], [], 10)
        assert closed
        assert reading.read() == b""


def test_a_check_without_time_left_is_not_started(tmp_path):
    late = Place("cpu", 1, tmp_path, time.monotonic() - 1)
    (figure,) = late.figures({"late": python(late, f"open({str(tmp_path / 'started')!r}, 'w')")})
    assert "--minutes" in figure.figure
    assert not (tmp_path / "started").exists()


@pytest.mark.slow
def test_the_checks_of_a_gpu_work_on_the_cpu(tmp_path):
    options = ["--device", "cpu", "--only", "speed", "ids", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tools.bench.gpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    figures = json.loads((tmp_path / "cpu.json").read_text())["figures"]
    assert done.returncode == 0, (done.stderr, figures)
    names = " ".join(row["what"] for row in figures)
    assert {"compiled", "float32", "bfloat16"} <= set(re.findall(r"\w+", names))
    assert all(row["met"] is not False for row in figures)
