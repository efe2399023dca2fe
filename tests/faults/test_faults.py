"""Every harmed run ends as if unharmed, or is refused with a remedy, and nothing is lost. Interrupted ones resume.

`make fast` makes a few examples of each kind, always the same; `make faults MINUTES=60` makes as many as fit.
"""

import io
import json
import os
import shutil
import signal
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.commands import Command, Outcome
from tests.faults.bundles import forge, interrupt_use
from tests.faults.files import NAMES, damage, plant
from tests.faults.judge import Harm, Judge
from tests.faults.surroundings import interrupt, run, surround
from tests.faults.values import FIELDS, harm_input, set_value
from tests.remedies import Patient, Useless
from tests.tiny_runs import STAGES, World, folders_of, snapshot

SLOW = pytest.mark.slow
CASES = [
    pytest.param(plant, 6, False, id="trees"),
    pytest.param(damage, 12, False, id="bytes"),
    pytest.param(set_value, 6, False, id="values"),
    pytest.param(harm_input, 6, False, id="inputs"),
    pytest.param(surround, 4, False, id="surroundings"),
    pytest.param(interrupt, 2, False, id="interruptions"),
    pytest.param(forge, 12, False, id="bundles"),
    pytest.param(interrupt_use, 3, False, id="uses"),
    pytest.param(plant, 10, True, id="trees-thorough", marks=SLOW),
    pytest.param(damage, 10, True, id="bytes-thorough", marks=SLOW),
    pytest.param(interrupt, 5, True, id="interruptions-thorough", marks=SLOW),
    pytest.param(interrupt_use, 15, True, id="uses-thorough", marks=SLOW),
    pytest.param(partial(interrupt, ranks=2), 1, True, id="two-ranks", marks=[SLOW, pytest.mark.multiprocess]),
]
"""What makes harms of a kind, how many in a short run, and whether slow stages run and remedies are carried out."""
SECONDS = 60 * float(os.environ.get("RAREC_FAULTS", "0")) / len(CASES)
"""How long each case goes on at random; by default it is short, and always the same."""
LONG = {"max_examples": 20, "phases": [Phase.generate, Phase.shrink]}
GOOD = "error: run/prepare/items.parquet is damaged\n  -> rebuild it: rarec prepare CONFIG --fresh\n"


@pytest.mark.parametrize(("harms", "few", "thorough"), CASES)
def test_a_harmed_run_ends_as_if_unharmed_or_is_refused_and_nothing_is_lost(harms, few, thorough, tiny_runs, tmp_path):
    tiny_runs.is_short = not (thorough or SECONDS)
    ways = LONG if SECONDS else {"max_examples": few, "phases": [Phase.generate], "derandomize": True}

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **ways)
    @given(st.data())
    def every(data: st.DataObject) -> None:
        place = tmp_path / "copy"
        shutil.rmtree(place, ignore_errors=True)
        harm = harms(data.draw, tiny_runs, place)
        try:
            faults = judge(tiny_runs, place, harm, thorough)
            assert not faults, f"{harm.what}; {harm.command.line}: {'; '.join(faults)}"
        finally:
            harm.restore()

    end = time.monotonic() + SECONDS
    every()
    while time.monotonic() < end:
        every()


def judge(world: World, place: Path, harm: Harm, follow: bool) -> list[str]:
    """Run the command of a harm, and what must come after it; return what is wrong."""
    for name in ("home", "tmp"):
        (place / name).mkdir(exist_ok=True)
    original, before = snapshot(world.state(world.copied)), snapshot(place)
    for command in harm.interruptions:
        run(command, harm.ranks)

    def attempt(harm: Harm) -> tuple[list[str], Outcome]:
        outcome = run(harm.command, harm.ranks)
        return Judge(world, place, harm, original, before, snapshot(place)).faults(outcome), outcome

    faults, outcome = attempt(harm)
    if faults or not outcome.code:
        return faults
    if harm.again:
        harm.restore()
        before = {path: entry for path, entry in snapshot(place).items() if path in before}
        return [f"the same command afterwards: {fault}" for fault in attempt(harm.afterwards())[0]]
    if outcome.code == 2 and follow:
        try:
            recovered = Patient(place, harm.afterwards().command).recover(outcome.stderr)
        except Useless as useless:
            return [str(useless)]
        if recovered and recovered[1].command.words == harm.command.words:
            now = snapshot(place)
            return list(Judge(world, place, harm, original, now, now).results())
    return []


def test_the_undisturbed_run_has_no_target_in_its_history(tiny_runs):
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted((tiny_runs.state("finished") / "run" / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                name, _, end = member.name.partition(".")
                samples.setdefault(name, {})[end] = tar.extractfile(member).read()
    assert samples
    for sample in samples.values():
        history = np.load(io.BytesIO(sample["history.npy"]))
        assert json.loads(sample["json"])["target"] not in history


def test_harms_reach_every_field_and_every_directory():
    assert {"run.dir", "train.lr", "ids.sasrec.dim", "prepare.interactions.path"} <= set(FIELDS)
    assert {name.split("/")[0] for name in NAMES} >= {folder.split("/")[0] for folder in folders_of(STAGES)}


ITEMS, NOTES = "run/prepare/items.parquet", "run/bundle/notes.txt"


@pytest.mark.parametrize(
    ("change", "code", "stderr", "fault"),
    [
        (lambda place: None, 2, GOOD, ""),
        (lambda place: None, -signal.SIGSEGV, GOOD, "exit code -11"),
        (lambda place: None, 2, GOOD.splitlines()[0], "no remedy"),
        (lambda place: None, 2, GOOD.replace("items.parquet", "a file"), "named"),
        (lambda place: None, 2, GOOD.replace("damaged", "damaged\x1b[31m"), "control character"),
        (lambda place: None, 2, GOOD + "Traceback (most recent call last)\n", "a traceback"),
        (lambda place: (place / "log/items.csv").unlink(), 0, "", "log/items.csv is gone"),
        (lambda place: os.utime(place / "config.yaml", (0, 0)), 2, GOOD, "config.yaml was changed"),
        (lambda place: (place / "core").touch(), 0, "", "it wrote core"),
        (lambda place: (place / NOTES).unlink(), 2, GOOD, "notes.txt is gone"),
        (lambda place: (place / ITEMS).write_bytes(b"x"), 0, "", f"{ITEMS} is damaged"),
        (lambda place: (place / ITEMS).write_bytes(b"x"), 2, GOOD, "items.parquet was lost"),
        (lambda place: (place / "run/.shards.aside-1").mkdir(), 0, "", "it left run/.shards.aside-1"),
        (lambda place: (place / "run/new").touch(0o600), 2, GOOD, "run/new has mode 600"),
    ],
)
def test_the_judge(tiny_runs, tmp_path, change, code, stderr, fault):
    place = tiny_runs.copy("finished", tmp_path / "copy")
    (place / NOTES).write_text("mine")
    harm = Harm("nothing", Command(["run", "config.yaml"], str(place)), ("items.parquet",), (NOTES,))
    original, before = snapshot(tiny_runs.state("finished")), snapshot(place)
    change(place)
    faults = Judge(tiny_runs, place, harm, original, before, snapshot(place)).faults(Outcome(code, "", stderr, 0.1))
    assert fault in "; ".join(faults)
    assert bool(faults) == bool(fault)
