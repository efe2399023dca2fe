"""Remedies of messages, carried out to the letter: the command then succeeds, and nothing else is lost."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rarec.storage.artefacts import MANIFEST
from tests.commands import Command, run_command
from tests.faults.judge import Harm, Judge
from tests.remedies import Patient, Useless
from tests.tiny_runs import snapshot

MINE = "the user's own words"


def flip(name: str) -> Callable[[Path], object]:
    def harm(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[len(data) // 2] ^= 1
        (run / name).write_bytes(data)

    return harm


def cut(name: str) -> Callable[[Path], object]:
    return lambda run: os.truncate(run / name, (run / name).stat().st_size // 2)


def remove(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).unlink()


def manifest(folder: str, **changes: object) -> Callable[[Path], object]:
    def harm(run: Path) -> None:
        path = run / folder / MANIFEST
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


def plant(name: str) -> Callable[[Path], object]:
    def harm(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(MINE)

    return harm


def best(run: Path) -> str:
    step = json.loads((run / "train" / "per_layer" / MANIFEST).read_text())["best_step"]
    return f"train/per_layer/checkpoints/step-{step:08d}/alignment.safetensors"


def every_checkpoint(run: Path) -> None:
    for path in (run / "train" / "per_layer" / "checkpoints").rglob("alignment.safetensors"):
        flip(path.relative_to(run).as_posix())(run)


def another_checkpoint(run: Path) -> None:
    """Put a checkpoint of another variant in the place of the newest."""
    newest = sorted((run / "train" / "per_layer" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    shutil.copytree(sorted((run / "train" / "text_only" / "checkpoints").iterdir())[-1], newest)


def nothing(run: Path) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """A message that is provoked.

    Attributes:
        command: what is refused, after `rarec`.
        harm: called with `run.dir` before.
        state: of the run before.
        named: what the message names.
        limits: of the first attempt alone.
        equal: whether the results are those of the undisturbed run in the end.
    """

    command: str
    harm: Callable[[Path], object] = nothing
    state: str = "finished"
    named: str = ""
    limits: dict[str, int] = field(default_factory=dict)
    equal: bool = True


CASES = {
    # an artefact that is damaged
    "a torn manifest of prepare": Case("run", cut("prepare/manifest.json"), named="prepare/manifest.json"),
    "a manifest without its files": Case("run", manifest("ids/id", files=None), named="ids/id/manifest.json"),
    "a manifest of another schema": Case("run", manifest("shards", schema=1), named="shards/manifest.json"),
    "a manifest of another kind": Case("evaluate", manifest("train/per_layer", kind="shards"), named="per_layer"),
    "an altered manifest": Case("run", manifest("bundle", settings={}), named="bundle/manifest.json"),
    "an altered manifest of an evaluation": Case("report", manifest("evaluation", hash="0"), named="evaluation"),
    "a table with a flipped bit": Case("ids --fresh", flip("prepare/users.parquet"), named="users.parquet"),
    "a table that is gone": Case("shards --fresh", remove("prepare/items.parquet"), named="items.parquet"),
    "vectors with a flipped bit": Case("shards --fresh", flip("ids/id/items.npy"), named="items.npy"),
    "an ID model that is cut": Case("evaluate --fresh", cut("ids/id/model.safetensors"), named="model.safetensors"),
    "a tar with a flipped bit": Case("train --fresh", flip("shards/000001.tar"), named="000001.tar"),
    "a tar that is gone": Case("train --fresh", remove("shards/000001.tar"), named="000001.tar"),
    "an index that is cut": Case("train --fresh", cut("shards/samples.npy"), named="samples.npy"),
    "the states of items with a flipped bit": Case(
        "train --fresh", flip("shards/item_states.npy"), named="item_states"
    ),
    "a tar that verification finds": Case("shards --verify --deep", flip("shards/000002.tar"), named="000002.tar"),
    "a best checkpoint with a flipped bit": Case("evaluate --fresh", lambda run: flip(best(run))(run), named="step-"),
    "a bundle with a flipped bit": Case(
        "recommend run/bundle --history i000,i001", flip("bundle/alignment.safetensors"), named="bundle"
    ),
    "a bundle without its facts": Case(
        "recommend run/bundle --history i000,i001", remove("bundle/recommender.json"), named="recommender.json"
    ),
    "figures that are torn": Case("report --fresh", cut("evaluation/metrics.json"), named="metrics.json"),
    "a record that is torn": Case("export --fresh", cut("record.json"), named="record.json"),
    # one that is half built
    "checkpoints of which none is whole": Case("train", every_checkpoint, "half-train", "checkpoints"),
    "a checkpoint of another training": Case("train", another_checkpoint, "half-train", "step-"),
    "notes of a build that are torn": Case("shards", cut("shards/.begun.json"), "half-shards", ".begun.json"),
    "a stage whose input is half built": Case("evaluate", nothing, "half-train", "per_layer"),
    "an input that is not there": Case("shards", nothing, "before-ids", "ids/id"),
    "an input that is far away": Case("train", nothing, "before-ids", "shards"),
    "a bundle that is not there": Case("recommend run/bundle --history i000,i001", nothing, "before-export", "bundle"),
    # other settings
    "other settings of prepare": Case(
        "ids prepare.min_user_interactions=7", named="min_user_interactions", equal=False
    ),
    "other settings of ids": Case("train ids.sasrec.epochs=5", named="epochs", equal=False),
    "other settings of training": Case("export train.lr=0.004", named="train.lr", equal=False),
    "another tracker": Case("train --fresh train.trackers=[nosuch]", named="train.trackers"),
    # what is the user's
    "a file in the place of a directory": Case("prepare", plant("prepare"), "before-prepare", "run/prepare"),
    "a directory that is the user's": Case("prepare", plant("prepare/notes.txt"), "before-prepare", "run/prepare"),
    "another folder that is the user's": Case("shards", plant("shards/notes.txt"), "before-neighbours", "run/shards"),
    "a file among the shards": Case("shards --verify --repair", plant("shards/notes.txt"), named="notes.txt"),
    # the machine
    "a full disk": Case("ids", nothing, "before-ids", "", {"RLIMIT_FSIZE": 2_000}),
}


def is_slow(case: Case) -> bool:
    return case.command.split()[0] in ("run", "ids", "train", "evaluate", "report") or "train" in case.command


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * is_slow(case)) for name, case in CASES.items()]
)
def test_a_remedy_that_is_carried_out_leads_to_success_and_loses_nothing_else(tiny_runs, tmp_path, name):
    case = CASES[name]
    place = tiny_runs.copy(case.state, tmp_path / "copy")
    case.harm(place / "run")
    before = snapshot(place)
    stage, *rest = case.command.split()
    command = Command([stage, *["config.yaml"] * (stage != "recommend"), *rest], str(place))
    first = run_command(Command(command.words, command.cwd, limits=case.limits))
    assert first.code == 2, first.stderr
    assert case.named in first.stderr
    recovered = Patient(place, command).recover(first.stderr)
    assert recovered, f"cannot be carried out: {first.stderr}"
    followed = recovered[0]
    after = snapshot(place)
    users = {path: entry.content for path, entry in before.items() if not path.startswith("run/")}
    assert {path: after[path].content for path in users} == users
    mine = [path for path in place.rglob("*") if path.is_file() and path.read_bytes() == MINE.encode()]
    assert len(mine) == ("plant" in case.harm.__qualname__.split(".")[0]), followed
    if case.equal:
        harm = Harm(name, command)
        original = snapshot(tiny_runs.state(case.state))
        assert not list(Judge(tiny_runs, place, harm, original, after, after).results()), followed


# ---- the reading of remedies


@pytest.mark.parametrize(
    ("remedy", "done"),
    [
        ("delete run/a.json: only notes are lost", "delete {root}/run/a.json"),
        ("delete it: only notes are lost", "delete {root}/run/a.json"),
        ("move it away, or choose another run.dir", "move {root}/run/a.json away"),
        ("choose another run.dir, or move that file away", "move {root}/run/a.json away"),
        ("choose another run.dir", "run.dir=another"),
        ("set train.lr: 0.1", "train.lr=0.1"),
        ("set `train.lr` to 0.1 or more", "train.lr=0.1"),
        ("install the tracker, or set train.trackers=[]", "train.trackers=[]"),
    ],
)
def test_remedies_are_read(tmp_path, remedy, done):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.json").write_text("{")
    patient = Patient(tmp_path, Command(["run", "config.yaml"], str(tmp_path)))
    followed = patient.follow(f"error: run/a.json is torn\n  -> {remedy}\n")
    assert followed is not None
    assert followed[0] == done.format(root=tmp_path)


def test_a_remedy_that_deletes_a_directory_is_too_wide(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.json").write_text("{")
    patient = Patient(tmp_path, Command(["run", "config.yaml"], str(tmp_path)))
    with pytest.raises(Useless):
        patient.follow("error: run/a.json is torn\n  -> delete run\n")


def test_what_nobody_can_carry_out_is_not(tmp_path):
    patient = Patient(tmp_path, Command(["run", "config.yaml"], str(tmp_path)))
    assert patient.follow("error: it is broken\n  -> restore it from a copy\n") is None
