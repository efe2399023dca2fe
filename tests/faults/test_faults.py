"""Every harmed run ends as if unharmed, or is refused with a remedy, and nothing is lost. Interrupted ones resume."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.commands import run_command
from tests.faults.bundles import harm_bundle
from tests.faults.files import NAMES, damage, plant
from tests.faults.judge import Harm, Judge, snapshot, users_files
from tests.faults.kills import LAUNCHED, Task
from tests.faults.surroundings import surround
from tests.faults.values import FIELDS, harm_input, set_value
from tests.faults.world import STAGES, Draw, World
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
    users = users_files(snapshot(place), original, harm.planted)

    def attempt(harm: Harm) -> tuple[list[str], int | None, str]:
        before, outcome = snapshot(place), run_command(harm.command)
        faults = Judge(world, place, harm, original, users, before, snapshot(place)).faults(outcome)
        return faults, outcome.code, outcome.stderr

    faults, code, said = attempt(harm)
    if not faults and code and harm.again:
        harm.restore()
        users = users_files(snapshot(place), original, harm.planted)  # what is restored may have another mode
        faults, code, said = attempt(harm.afterwards())
        return [f"the same command afterwards: {fault}" for fault in [*faults, *[f"code {code}: {said}"] * bool(code)]]
    if not faults and code == 2 and follow:
        try:
            recovered = Patient(place, harm.afterwards().command).recover(said)
        except Useless as useless:
            return [str(useless)]
        if recovered and recovered[1].command.words == harm.command.words:
            now = snapshot(place)
            return list(Judge(world, place, harm, original, {}, now, now).results())
    return faults


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
    [("trees", 14), ("bytes", 16), ("values", 18), ("inputs", 14), ("bundles", 12), ("surroundings", 8)],
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
