"""The judge of harmed runs notices what is wrong: its own faults on purpose."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.commands import Command, Outcome, run_command
from tests.faults.judge import Harm, Judge, snapshot, users_files
from tests.faults.kills import Task

GOOD = "error: run/prepare/items.parquet is damaged\n  -> rebuild it: rarec prepare CONFIG --fresh\n"


@pytest.fixture
def place(tiny_runs, tmp_path):
    return tiny_runs.copy("finished", tmp_path / "copy")


def faults(tiny_runs, place, harm: Harm, change, code: int, stderr: str = "") -> str:
    """Return what the judge says of a command that changes the place and ends so."""
    original, before = snapshot(tiny_runs.state("finished")), snapshot(place)
    users = users_files(before, original, harm.planted)
    change()
    judge = Judge(tiny_runs, place, harm, original, users, before, snapshot(place))
    return "; ".join(judge.faults(Outcome(code, "", stderr, cpu=0.1)))


def harm(place: Path, stage: str = "run", **changes) -> Harm:
    return Harm("nothing", Command([stage, "config.yaml"], str(place)), **changes)


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("stderr", "code", "fault"),
    [
        (GOOD, 2, ""),
        (GOOD, 1, "exit code 1"),
        (GOOD, 70, "exit code 70"),
        (GOOD, -signal.SIGSEGV, "exit code -11"),
        ("", 2, "0 lines"),
        (GOOD * 2, 2, "2 lines"),
        (GOOD.splitlines()[0], 2, "no remedy"),
        (GOOD.replace("items.parquet", "a file"), 2, "named"),
        (GOOD.replace("damaged", "damaged\x1b[31m"), 2, "control character"),
        (GOOD.replace("damaged", "x" * 3_000), 2, "3082 characters"),
        (GOOD + "Traceback (most recent call last)\n", 2, "a traceback"),
    ],
)
def test_the_judge_of_messages(tiny_runs, place, stderr, code, fault):
    found = faults(tiny_runs, place, harm(place, names=("items.parquet",)), nothing, code, stderr)
    assert fault in found
    assert bool(found) == bool(fault)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda place: (place / "log" / "items.csv").unlink(), "log/items.csv is gone"),
        (lambda place: (place / "config.yaml").write_text("run: {}"), "config.yaml was changed"),
        (lambda place: (place / "config.yaml").chmod(0o600), "config.yaml was changed"),
        (lambda place: os.utime(place / "config.yaml", (0, 0)), "config.yaml was changed"),
        (lambda place: (place / "core").touch(), "it wrote core"),
        (lambda place: (place / "run" / "bundle" / "notes.txt").unlink(), "notes.txt is gone"),
    ],
)
@pytest.mark.parametrize("code", [0, 2])
def test_the_judge_of_what_is_the_users(tiny_runs, place, change, fault, code):
    (place / "run" / "bundle" / "notes.txt").write_text("mine")
    planted = harm(place, planted=("run/bundle/notes.txt",))
    assert fault in faults(tiny_runs, place, planted, lambda: change(place), code, GOOD * (code == 2))


@pytest.mark.parametrize(
    ("change", "code", "fault"),
    [
        (lambda run: (run / "prepare" / "items.parquet").write_bytes(b"x"), 0, "run/prepare/items.parquet is damaged"),
        (lambda run: (run / "prepare" / "items.parquet").write_bytes(b"x"), 2, "items.parquet was lost"),
        (lambda run: (run / "shards" / "manifest.json").unlink(), 0, "run/shards/manifest.json cannot be read"),
        (lambda run: shutil.rmtree(run / "shards"), 2, "finished run/shards/000000.tar was lost"),
        (lambda run: (run / ".shards.aside-1").mkdir(), 0, "it left run/.shards.aside-1"),
        (lambda run: (run / "new").touch(0o600), 0, "run/new has mode 600"),
    ],
)
def test_the_judge_of_what_is_finished(tiny_runs, place, change, code, fault):
    assert fault in faults(tiny_runs, place, harm(place), lambda: change(place / "run"), code, GOOD * (code == 2))


def test_the_judge_of_another_result(tiny_runs, place):
    """A whole artefact, but not the undisturbed one."""
    text = (place / "config.yaml").read_text()
    (place / "config.yaml").write_text(text.replace("epochs: 4", "epochs: 3"))
    words = ["ids", "config.yaml", "--fresh"]
    assert run_command(Command(words, str(place))).code == 0
    assert "run/ids/id differs from the undisturbed one" in faults(tiny_runs, place, harm(place, "ids"), nothing, 0)


def test_kills_notice_another_result_and_what_is_lost_or_left(tiny_runs, tmp_path):
    task = Task(tiny_runs, tmp_path / "copy", "ids", fresh=True)
    expected, _ = task.undisturbed()
    tiny_runs.copy(task.state, task.place)
    run = task.place / "run"
    (run / "ids" / "id" / "items.npy").write_bytes(b"other")
    (run / "prepare" / "users.parquet").unlink()
    (run / "ids" / ".id.fresh").mkdir()
    found = "; ".join(task.faults(expected))
    assert "ids/id/items.npy differs" in found
    assert "run/prepare/users.parquet was changed" in found
    assert "run/ids/.id.fresh is left" in found
