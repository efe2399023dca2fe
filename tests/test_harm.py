"""A seeded hundred of the harms of tools/check_harm.py, and the judge's own faults on purpose."""

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

from check_harm import CLASSES  # noqa: E402
from check_kills import Killer, Task  # noqa: E402
from harm_files import NAMES  # noqa: E402
from harm_oracle import Harm, Judge, snapshot, users_files  # noqa: E402
from harm_process import Command, Outcome  # noqa: E402
from harm_values import FIELDS  # noqa: E402

ENGINE = ROOT / "configs" / "accelerate" / "cpu.yaml"
EXAMPLES = {"trees": 18, "bytes": 22, "values": 22, "inputs": 16, "bundles": 13, "surroundings": 9}
"""Examples of each class, a hundred together: fewer of those that take a process of their own."""
GOOD = "error: run/prepare/items.parquet is damaged\n  -> rebuild it: rarec prepare CONFIG --fresh\n"


@pytest.mark.parametrize("kind", CLASSES)
def test_a_harmed_run_ends_as_if_unharmed_or_is_refused_with_a_remedy_and_nothing_is_lost(examples, kind):
    """To repeat one: `python tools/check_harm.py --quick --only CLASS --seed SEED --examples 1`."""
    verdicts = {seed: examples.run(kind, seed, quick=True) for seed in range(EXAMPLES[kind])}
    failed = [f"{kind} {seed}: {verdict}" for seed, verdict in verdicts.items() if verdict.faults]
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trees", "bytes"])
def test_remedies_lead_to_the_results_of_an_undisturbed_run(examples, kind):
    verdicts = {seed: examples.run(kind, seed, follow=True) for seed in range(1000, 1000 + EXAMPLES[kind] // 2)}
    failed = [f"{kind} {seed}: {verdict}" for seed, verdict in verdicts.items() if verdict.faults]
    assert not failed, "\n".join(failed)


def test_an_example_is_determined_by_its_class_and_seed(examples, tmp_path):
    for kind, draw in CLASSES.items():
        harms = []
        for name in ("a", "b"):
            harms.append(draw(random.Random(f"{kind} 7"), examples.world, tmp_path / name))
            harms[-1].release()
            shutil.rmtree(tmp_path / name)
        assert harms[0].what == harms[1].what
        assert harms[0].command.words == harms[1].command.words


def test_harms_reach_every_field_and_every_directory():
    assert {"run.dir", "train.lr", "ids.sasrec.dim", "prepare.interactions.path"} <= set(FIELDS)
    places = ("prepare", "ids", "neighbours", "shards", "train", "evaluation", "bundle", "report")
    assert {name.split("/")[0] for name in NAMES} >= set(places)


# ---- the judge


@pytest.fixture
def place(examples, tmp_path):
    return examples.world.copy("finished", tmp_path / "copy")


def faults(examples, place, harm: Harm, change, code: int, stderr: str = "") -> str:
    """Return what the judge says of a command that changes the place and ends so."""
    original, before = snapshot(examples.world.state("finished")), snapshot(place)
    users = users_files(before, original, harm.planted)
    change()
    judge = Judge(examples.world, place, harm, original, users, before, snapshot(place))
    return "; ".join(judge.judge(Outcome(code, "", stderr, cpu=0.1, wall=0.1)))


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
def test_the_judge_of_messages(examples, place, stderr, code, fault):
    found = faults(examples, place, harm(place, names=("items.parquet",)), nothing, code, stderr)
    assert fault in found
    assert bool(found) == bool(fault)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda place: (place / "log" / "items.csv").unlink(), "log/items.csv is gone"),
        (lambda place: (place / "config.yaml").write_text("run: {}"), "config.yaml has another"),
        (lambda place: (place / "config.yaml").chmod(0o600), "config.yaml has another mode"),
        (lambda place: os.utime(place / "config.yaml", (0, 0)), "config.yaml has another mtime"),
        (lambda place: (place / "core").touch(), "it wrote core"),
        (lambda place: (place / "run" / "bundle" / "notes.txt").unlink(), "notes.txt is gone"),
    ],
)
@pytest.mark.parametrize("code", [0, 2])
def test_the_judge_of_what_is_the_users(examples, place, change, fault, code):
    (place / "run" / "bundle" / "notes.txt").write_text("mine")
    planted = harm(place, planted=("run/bundle/notes.txt",))
    assert fault in faults(examples, place, planted, lambda: change(place), code, GOOD * (code == 2))


@pytest.mark.parametrize(
    ("change", "code", "fault"),
    [
        (lambda run: (run / "prepare" / "items.parquet").write_bytes(b"x"), 0, "run/prepare/items.parquet is damaged"),
        (lambda run: (run / "prepare" / "items.parquet").write_bytes(b"x"), 2, "items.parquet was lost"),
        (lambda run: (run / "shards" / "manifest.json").unlink(), 0, "run/shards/manifest.json is missing"),
        (lambda run: shutil.rmtree(run / "shards"), 2, "finished run/shards/000000.tar was lost"),
        (lambda run: (run / ".shards.aside-1").mkdir(), 0, "it left run/.shards.aside-1"),
        (lambda run: (run / "new").touch(0o600), 0, "run/new has mode 600"),
    ],
)
def test_the_judge_of_what_is_finished(examples, place, change, code, fault):
    assert fault in faults(examples, place, harm(place), lambda: change(place / "run"), code, GOOD * (code == 2))


def test_the_judge_of_another_result(examples, place):
    """A whole artefact, but not the undisturbed one."""
    text = (place / "config.yaml").read_text()
    (place / "config.yaml").write_text(text.replace("epochs: 4", "epochs: 3"))
    words = ["ids", "config.yaml", "--fresh"]
    assert examples.server.run(Command(words, str(place))).code == 0
    assert "run/ids/id differs from the undisturbed one" in faults(examples, place, harm(place, "ids"), nothing, 0)


# ---- kills


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "fresh", "times"), [("ids", True, 3), ("train", False, 3), ("run", True, 2)])
def test_a_stage_that_is_interrupted_again_and_again_ends_as_one_that_is_not(examples, tmp_path, stage, fresh, times):
    killer = Killer(examples.world, tmp_path / "copy", ENGINE, seed=1)
    while killer.interrupted.total() < times:
        assert killer.disturb(Task(stage, fresh, 1), times) == []


@pytest.mark.multiprocess
def test_a_launched_training_that_is_interrupted_ends_as_one_that_is_not(examples, tmp_path):
    killer = Killer(examples.world, tmp_path / "copy", ENGINE, seed=1)
    assert killer.disturb(Task("train", True, 2), 2) == []


def test_kills_notice_another_result_and_what_is_lost_or_left(examples, tmp_path):
    killer = Killer(examples.world, tmp_path / "copy", ENGINE, seed=1)
    task = Task("ids", True, 1)
    killer.undisturbed(task)

    def harmed(_: object) -> tuple[int, str]:
        run = killer.place / "run"
        (run / "ids" / "id" / "items.npy").write_bytes(b"other")
        (run / "prepare" / "users.parquet").unlink(missing_ok=True)
        (run / "ids" / ".id.fresh").mkdir(exist_ok=True)
        return 0, ""

    killer._run = harmed  # type: ignore[method-assign, assignment]
    found = "; ".join(killer.disturb(task, 0))
    assert "ids/id/items.npy differs" in found
    assert "run/prepare/users.parquet was changed" in found
    assert "run/ids/.id.fresh is left" in found
