"""Every harmed run ends as if unharmed, or is refused with a remedy, and nothing is lost. Interrupted ones resume.

The judge of these ends notices what is wrong: its own faults on purpose.
"""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.commands import Command, Outcome, run_command
from tests.faults.files import NAMES, damage, harm_bundle, plant
from tests.faults.judge import Harm, Judge
from tests.faults.surroundings import LAUNCHED, Task, surround
from tests.faults.values import FIELDS, harm_input, set_value
from tests.faults.world import STAGES, Draw, World, snapshot
from tests.remedies import Patient, Useless

HARMS: dict[str, Callable[[Draw, World, Path], Harm]] = {
    "trees": plant,
    "bytes": damage,
    "values": set_value,
    "inputs": harm_input,
    "bundles": harm_bundle,
    "surroundings": surround,
}
EXAMPLES = int(os.environ.get("RAREC_FAULTS", "0"))
"""Examples of each kind, at random; by default a few, the same each time."""
LONG = {"phases": [Phase.generate, Phase.shrink], "derandomize": False}
SHORT = {"phases": [Phase.generate], "derandomize": True}
ITEMS = "run/prepare/items.parquet"
GOOD = f"error: {ITEMS} is damaged\n  -> rebuild it: rarec prepare CONFIG --fresh\n"


def examples(few: int) -> settings:
    ways = LONG if EXAMPLES else SHORT
    checks = list(HealthCheck)
    return settings(max_examples=EXAMPLES or few, deadline=None, database=None, suppress_health_check=checks, **ways)


def judge(world: World, place: Path, harm: Harm, follow: bool) -> list[str]:
    """Run the command of a harm, and what must come after it; return what is wrong."""
    for name in ("home", "tmp"):
        (place / name).mkdir(exist_ok=True)
    own = {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp")} | harm.command.environment
    harm = replace(harm, command=replace(harm.command, environment=own))
    original = snapshot(world.state(world.copied))

    def attempt(harm: Harm) -> tuple[list[str], Outcome]:
        before, outcome = snapshot(place), run_command(harm.command)
        return Judge(world, place, harm, original, before, snapshot(place)).faults(outcome), outcome

    faults, outcome = attempt(harm)
    if faults or not outcome.code:
        return faults
    if harm.again:
        harm.restore()
        faults, outcome = attempt(harm.afterwards())
        faults += [f"code {outcome.code}: {outcome.stderr}"] * bool(outcome.code)
        return [f"the same command afterwards: {fault}" for fault in faults]
    if outcome.code == 2 and follow:
        try:
            recovered = Patient(place, harm.afterwards().command).recover(outcome.stderr)
        except Useless as useless:
            return [str(useless)]
        if recovered and recovered[1].command.words == harm.command.words:
            now = snapshot(place)
            return list(Judge(world, place, harm, original, now, now).results())
    return []


def check(kind: str, world: World, tmp_path: Path, few: int, follow: bool = False) -> None:
    @examples(few)
    @given(st.data())
    def every(data: st.DataObject) -> None:
        place = tmp_path / "copy"
        shutil.rmtree(place, ignore_errors=True)
        harm = HARMS[kind](data.draw, world, place)
        try:
            faults = judge(world, place, harm, follow)
            assert not faults, f"{harm.what}; {harm.command.line}: {'; '.join(faults)}"
        finally:
            harm.release()

    every()


@pytest.mark.parametrize(
    ("kind", "few"),
    [("trees", 14), ("bytes", 16), ("values", 16), ("inputs", 12), ("bundles", 12), ("surroundings", 8)],
)
def test_a_harmed_run_ends_as_if_unharmed_or_is_refused_and_nothing_is_lost(kind, few, tiny_runs, tmp_path):
    check(kind, tiny_runs, tmp_path, few)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trees", "bytes"])
def test_remedies_lead_to_the_results_of_an_undisturbed_run(kind, tiny_runs, tmp_path):
    check(kind, tiny_runs, tmp_path, few=10, follow=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.multiprocess)])
def test_a_stage_that_is_interrupted_again_and_again_ends_as_one_that_is_not(ranks, tiny_runs, tmp_path):
    @examples(few=5 if ranks == 1 else 1)
    @given(st.data(), st.sampled_from([*STAGES, "run"] if ranks == 1 else LAUNCHED), st.booleans(), st.integers(1, 4))
    def every(data: st.DataObject, stage: str, fresh: bool, interruptions: int) -> None:
        task = Task(tiny_runs, tmp_path / "copy", stage, fresh, ranks)
        faults = task.disturbed(data.draw, interruptions)
        assert not faults, f"{stage}{' --fresh' * fresh}: {'; '.join(faults)}"

    every()


def test_harms_reach_every_field_and_every_directory():
    assert {"run.dir", "train.lr", "ids.sasrec.dim", "prepare.interactions.path"} <= set(FIELDS)
    places = ("prepare", "ids", "neighbours", "shards", "train", "evaluation", "bundle", "report")
    assert {name.split("/")[0] for name in NAMES} >= set(places)


# ---- the judge


@pytest.fixture
def place(tiny_runs, tmp_path):
    return tiny_runs.copy("finished", tmp_path / "copy")


@pytest.fixture
def verdict(tiny_runs, place):
    """Return what the judge says of a command that changes the place and ends so."""

    def verdict(change: Callable[[Path], object], code: int, stderr: str = "", stage: str = "run", **fields) -> str:
        harm = Harm("nothing", Command([stage, "config.yaml"], str(place)), **fields)
        original, before = snapshot(tiny_runs.state("finished")), snapshot(place)
        change(place)
        judge = Judge(tiny_runs, place, harm, original, before, snapshot(place))
        return "; ".join(judge.faults(Outcome(code, "", stderr, cpu=0.1)))

    return verdict


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
def test_the_judge_of_messages(verdict, stderr, code, fault):
    faults = verdict(lambda place: None, code, stderr, names=("items.parquet",))
    assert fault in faults
    assert bool(faults) == bool(fault)


@pytest.mark.parametrize(
    ("change", "code", "fault"),
    [
        (lambda place: (place / "log" / "items.csv").unlink(), 0, "log/items.csv is gone"),
        (lambda place: (place / "config.yaml").write_text("run: {}"), 2, "config.yaml was changed"),
        (lambda place: (place / "config.yaml").chmod(0o600), 0, "config.yaml was changed"),
        (lambda place: os.utime(place / "config.yaml", (0, 0)), 2, "config.yaml was changed"),
        (lambda place: (place / "core").touch(), 0, "it wrote core"),
        (lambda place: (place / "run/bundle/notes.txt").unlink(), 2, "notes.txt is gone"),
        (lambda place: (place / ITEMS).write_bytes(b"x"), 0, f"{ITEMS} is damaged"),
        (lambda place: (place / ITEMS).write_bytes(b"x"), 2, "items.parquet was lost"),
        (lambda place: (place / "run/shards/manifest.json").unlink(), 0, "run/shards/manifest.json cannot be read"),
        (lambda place: shutil.rmtree(place / "run/shards"), 2, "finished run/shards/000000.tar was lost"),
        (lambda place: (place / "run/.shards.aside-1").mkdir(), 0, "it left run/.shards.aside-1"),
        (lambda place: (place / "run/new").touch(0o600), 0, "run/new has mode 600"),
    ],
)
def test_the_judge_of_files(verdict, place, change, code, fault):
    """Those of the user are untouched, in `run.dir` too; finished work is whole; nothing is left."""
    (place / "run/bundle/notes.txt").write_text("mine")
    assert fault in verdict(change, code, GOOD * (code == 2), planted=("run/bundle/notes.txt",))


def test_the_judge_of_another_result(verdict, place):
    """An artefact is whole, but not the undisturbed one."""
    text = (place / "config.yaml").read_text()
    (place / "config.yaml").write_text(text.replace("epochs: 4", "epochs: 3"))
    assert run_command(Command(["ids", "config.yaml", "--fresh"], str(place))).code == 0
    assert "run/ids/id differs from the undisturbed one" in verdict(lambda place: None, 0, stage="ids")


def test_interruptions_notice_another_result_and_what_is_lost_or_left(tiny_runs, tmp_path):
    task = Task(tiny_runs, tmp_path / "copy", "ids", fresh=True)
    expected, _ = task.undisturbed()
    tiny_runs.copy(task.state, task.place)
    run = task.place / "run"
    (run / "ids" / "id" / "items.npy").write_bytes(b"other")
    (run / "prepare" / "users.parquet").unlink()
    (run / "ids" / ".id.fresh").mkdir()
    faults = "; ".join(task.faults(expected))
    assert "ids/id/items.npy differs" in faults
    assert "run/prepare/users.parquet was changed" in faults
    assert "run/ids/.id.fresh is left" in faults
