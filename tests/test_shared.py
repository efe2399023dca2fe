"""Artefacts that several runs share: their names, who builds them, and two processes that build the same ones."""

import re
import time
from pathlib import Path

import pytest

from rarec.config.load import format_override
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.planning.setup import Cluster
from rarec.stages.run import Run
from rarec.stages.train import plan
from rarec.storage.artefacts import MANIFEST
from rarec.storage.files import read_json, write_json
from tests.conftest import make_world
from tests.ranks import START
from tests.sweeps import SMALL

SMALLER = [format_override(name, value) for name, value in SMALL.items() if name != "neighbours.models"]
SHARED = ("prepare", "ids", "neighbours", "shards")
ONE = Cluster.of(1, 1, None, "H100")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


def paths(config: Path, *overrides: str) -> tuple[str, str, str]:
    """Return the names of prepared data, ID vectors and shards."""
    run = Run(config, ["run.shared=x", *overrides])
    return run.directory("prepare").name, run.directory("ids", "id").name, run.directory("shards").name


def opened(config: Path, name: str, *overrides: str):
    root = config.parent
    return open_run(config, [f"run.dir={root / name}", f"run.shared={root / 'shared'}", *SMALLER, *overrides])


def test_without_a_shared_directory_all_is_in_the_runs_own(world):
    run, root = Run(world), world.parent / "run"
    directories = [run.directory("prepare"), run.directory("ids", "id"), run.directory("shards")]
    assert directories == [root / "prepare", root / "ids" / "id", root / "shards"]


@pytest.mark.parametrize(
    ("override", "differ"),
    [
        ("train.lr=0.5", (False, False, False)),
        ("train.variants=[text_only]", (False, False, False)),
        ("evaluate.resamples=7", (False, False, False)),
        ("prepare.memory=1GB", (False, False, False)),
        ("shards.writers=1", (False, False, False)),
        ("llm.attention=eager", (False, False, False)),
        ("ids.gru4rec.hidden=7", (False, False, False)),  # not the model that is chosen
        ("shards.share=0.5", (False, False, True)),
        ("prompt.separator=;", (False, False, True)),
        ("llm.path=/elsewhere", (False, False, True)),
        ("readout.pool=last", (False, False, True)),
        ("alignment.instructions=3", (False, False, True)),
        ("ids.sasrec.dim=8", (False, True, True)),
        ("ids.model=gru4rec", (False, True, True)),
        ("prepare.min_user_interactions=3", (True, True, True)),
        ("run.seed=18", (True, True, True)),
    ],
)
def test_names_differ_where_what_shapes_an_artefact_or_its_inputs_does(world, override, differ):
    before, after = paths(world), paths(world, override)
    assert tuple(old != new for old, new in zip(before, after, strict=True)) == differ
    for kind, name in zip(("prepare", "ids-id", "shards"), after, strict=True):
        assert re.fullmatch(rf"{kind}-[0-9a-f]{{16}}", name)


def test_a_further_source_has_a_name_of_its_own_and_enters_that_of_the_shards(world):
    with_image = ["sources.image.items=a.npy"]
    assert paths(world, *with_image)[:2] == paths(world)[:2]
    assert paths(world, *with_image)[2] != paths(world)[2]
    runs = [Run(world, ["run.shared=x", f"sources.image.items={file}.npy"]) for file in "ab"]
    first, second = (run.directory("ids", "image") for run in runs)
    assert first.name.startswith("ids-image-")
    assert first != second


def test_tables_are_known_by_their_engine_too_but_not_by_its_password(world):
    table = ["prepare.interactions.path=null", "prepare.interactions.table=log"]
    first, other = (paths(world, *table, f"prepare.engine=postgres://me:{p}@host/a") for p in ("x", "y"))
    assert first == other
    assert first != paths(world, *table, "prepare.engine=postgres://me:x@host/b")


def test_a_second_run_makes_nothing_that_it_shares_and_ends_with_the_same_shards(world):
    opened(world, "first").run(SHARED)
    made = {path: path.stat().st_mtime_ns for path in (world.parent / "shared").rglob("*")}
    kinds = [path.parent.name.partition("-")[0] for path in made if path.name == MANIFEST]
    assert sorted(kinds) == ["ids", *["neighbours"] * 5, "prepare", "shards"]
    second = opened(world, "second", "train.lr=0.01")
    assert [second.make(name) for name in SHARED] == [False] * 4
    assert {path: path.stat().st_mtime_ns for path in (world.parent / "shared").rglob("*")} == made
    assert not (world.parent / "second").exists()
    second.make("train")
    assert sorted(path.name for path in (world.parent / "second").iterdir()) == [
        "record.json",
        "resolved.yaml",
        "train",
    ]


def test_a_plan_counts_the_shared_shards(world):
    opened(world, "first").run(SHARED)
    counted = plan(opened(world, "second"), ONE, "0").calculator.samples
    other = plan(opened(world, "third", "shards.share=0.5"), ONE, "0").calculator.samples
    assert counted is not None
    assert other is None


def test_what_was_altered_or_made_from_another_log_is_refused_as_in_a_run_of_its_own(world):
    opened(world, "first").make("prepare")
    log = world.parent / "log" / "interactions.csv"
    log.write_text(log.read_text() + "u000,i039,1800000000\n")
    with pytest.raises(UserError, match="made from another interactions"):
        opened(world, "second").make("prepare")
    manifest = opened(world, "first").directory("prepare") / MANIFEST
    write_json(manifest, {**read_json(manifest), "made_from": {}})
    with pytest.raises(UserError, match="altered"):
        opened(world, "second").make("ids")


def _make(config: Path, name: str, output: Path, stages: tuple[str, ...] = SHARED) -> None:
    """Build the stages of a run, in another process, and write its lines to a file."""
    with output.open("w", buffering=1) as file:
        run, built = opened(config, name), []
        run.say = lambda line: print(line, file=file)
        for stage in stages:
            print(f"{stage} begins", file=file)
            built += [stage] if run.make(stage) else []
        print(f"built: {' '.join(built)}", file=file)


def _race(config: Path, names: list[str], stages: tuple[str, ...] = SHARED) -> list[str]:
    """Start these runs at the same time and return the lines of each."""
    outputs = [config.parent / f"{number}.txt" for number in range(len(names))]
    racing = [START.Process(target=_make, args=(config, *pair, stages)) for pair in zip(names, outputs, strict=True)]
    for process in racing:
        process.start()
    for process in racing:
        process.join(120)
    assert [process.exitcode for process in racing] == [0] * len(racing)
    return [path.read_text() for path in outputs]


@pytest.mark.slow
def test_two_that_want_the_same_at_the_same_time_make_it_once(world):
    said = _race(world, ["a", "b"])
    for artefact in ("prepare-", "ids-id-", "shards-"):
        ready = [re.search(rf"{artefact}\w+ is up to date", text) is not None for text in said]
        assert sorted(ready) == [False, True], said
    left = [path.name for path in (world.parent / "shared").iterdir()]
    assert not [name for name in left if ".aside-" in name or "progress" in name or name.endswith(".fresh")]


@pytest.mark.slow
def test_two_in_one_run_directory_train_and_evaluate_once(world):
    _make(world, "same", world.parent / "before.txt")
    said = _race(world, ["same", "same"], ("train", "evaluate"))
    for artefact in ("per_layer", "evaluation"):
        ready = [f"{artefact} is up to date" in text for text in said]
        assert sorted(ready) == [False, True], said


@pytest.mark.slow
def test_a_killed_build_is_finished_by_the_next_process(world):
    outputs = [world.parent / f"{name}.txt" for name in "ab"]
    slow, next_one = (START.Process(target=_make, args=(world, path.stem, path)) for path in outputs)
    slow.start()
    deadline = time.monotonic() + 60
    while not (outputs[0].exists() and "ids begins" in outputs[0].read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    slow.kill()
    slow.join()
    next_one.start()
    next_one.join(120)
    assert next_one.exitcode == 0
    assert re.search("built: (ids )?(neighbours )?shards", outputs[1].read_text())
