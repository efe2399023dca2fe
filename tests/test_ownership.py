"""rarec replaces and deletes only what it made; what is there stays until its replacement is whole; damage is named."""

import shutil
from pathlib import Path

import pytest
import yaml

from rarec.entry import open_run
from rarec.errors import UserError
from rarec.stages import STAGES
from rarec.storage.artefacts import IDENTITY, MANIFEST
from rarec.storage.directories import MARKER, claim, discard, foreign, new_directory
from rarec.storage.files import read_json, temporary_path, write_json
from tests.conftest import make_world
from tests.processes import unfinish
from tests.test_stage import state

STAGE_OF = {name: name for name in ("prepare", "ids", "neighbours", "shards")}
STAGE_OF |= {"evaluation": "evaluate", "bundle": "export"}


def refused(config: Path, stage: str, *named: str, fresh: bool = False, overrides: tuple[str, ...] = ()) -> str:
    """Make a stage, which must be refused with these names and a remedy; return the remedy."""
    with pytest.raises(UserError) as error:
        open_run(config, overrides).make(stage, fresh=fresh)
    for name in named:
        assert name in error.value.problem
    assert error.value.remedy
    return error.value.remedy


@pytest.fixture(scope="module")
def pristine(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a configuration, its finished run, and a copy of that."""
    base = tmp_path_factory.mktemp("pristine")
    tree = yaml.safe_load(finished.read_text())
    shutil.copytree(tree["run"]["dir"], base / "run")
    tree["run"]["dir"] = str(base / "run")
    (base / "mine.yaml").write_text(yaml.safe_dump(tree))
    open_run(base / "mine.yaml").make("report")  # it names run.dir
    shutil.copytree(base / "run", base / "copy")
    return base


@pytest.fixture
def run(pristine: Path) -> tuple[Path, Path]:
    """A configuration, and the directory of its finished run."""
    shutil.rmtree(pristine / "run")
    shutil.copytree(pristine / "copy", pristine / "run")
    return pristine / "mine.yaml", pristine / "run"


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The configuration of a run of which nothing is made; its logs lie beside it."""
    return make_world(tmp_path)


# ---- what is in the way


@pytest.mark.parametrize(
    ("field", "inside"),
    [
        ("prepare.interactions.path", "prepare/interactions.csv"),
        ("prepare.items.path", "shards/items.csv"),
        ("prepare.interactions.path", "cache/*.csv"),
        ("llm.path", "train/per_layer/llm"),
    ],
)
def test_an_input_inside_a_directory_that_is_replaced_is_refused(begun, field, inside):
    run = open_run(begun)
    source, target = Path(run.config.inputs[field]), run.root / inside.replace("*", "log")
    target.parent.mkdir(parents=True)
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    before = state(run.root)
    refused(begun, "prepare", field, str(run.root), overrides=(f"{field}={run.root / inside}",))
    assert state(run.root) == before


def test_a_folder_of_tables_around_the_run_is_refused_before_its_files_are_taken_for_the_users(begun, tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    shutil.copy(open_run(begun).config.prepare.interactions.path, folder)
    before = state(folder)
    overrides = (f"prepare.interactions.path={folder}", f"run.dir={folder}/runs/mine")
    refused(begun, "prepare", "prepare.interactions.path", str(folder / "runs" / "mine"), overrides=overrides)
    assert state(folder) == before
    open_run(begun, (f"prepare.interactions.path={folder}/*.csv", overrides[1])).make("prepare")


def test_a_configuration_is_never_written_and_one_inside_an_artefact_is_refused(begun, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    text = begun.read_text() + "# my comment\n"
    for name in ("config.yaml", "mine.yaml"):
        (mine / name).write_text(text)
    overrides = (f"run.dir={mine}",)
    open_run(mine / "config.yaml", overrides).make("prepare")
    assert (mine / "config.yaml").read_text() == (mine / "mine.yaml").read_text() == text
    shutil.copy(begun, mine / "prepare" / "config.yaml")
    refused(mine / "prepare" / "config.yaml", "prepare", "config.yaml", overrides=overrides)


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("report", "report/notes.txt"),
        ("shards", "shards/000099.tar"),
        ("prepare", "prepare/sub/log.csv"),
        ("ids", "ids/id/.hidden"),
        ("export", "bundle/mine.safetensors"),
        ("train", "train/per_layer/checkpoints/notes.txt"),
        ("train", "train/per_layer/checkpoints/step-abc/file"),
        ("evaluate", "evaluation/.metrics.json.aside-1"),
    ],
)
def test_a_file_inside_an_artefact_that_rarec_did_not_make_is_kept(run, stage, file):
    config, root = run
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text("mine")
    before = state(root)
    open_run(config).make(stage)
    refused(config, stage, str(root / file), fresh=True)
    assert state(root) == before


def test_a_tar_of_the_users_in_unfinished_shards_is_refused_and_moved_away_the_shards_are_finished(run):
    config, root = run
    whole = read_json(root / "shards" / MANIFEST)["hash"]
    shutil.rmtree(root / "shards")
    (root / "shards").mkdir()
    (root / "shards" / "000000.tar").write_text("mine")
    refused(config, "shards", str(root / "shards"))
    assert (root / "shards" / "000000.tar").read_text() == "mine"
    (root / "shards").rename(root / "away")
    open_run(config).make("shards")
    assert read_json(root / "shards" / MANIFEST)["hash"] == whole


# ---- directories


def test_claimed_names_may_be_written_again_and_others_may_not(tmp_path):
    place = tmp_path / "made"
    with new_directory(place, ["later", "logs/"]):
        pass
    (place / "later").write_text("one")
    (place / "logs").mkdir()
    (place / "logs" / "any").write_text("two")
    assert foreign(place) is None
    claim(place, ["later", "more"])
    (place / "more").write_text("three")
    assert foreign(place) is None
    (place / "mine").write_text("four")
    assert foreign(place) == place / "mine"
    with pytest.raises(UserError, match="mine"):
        claim(place, ["mine"])
    discard(place)
    assert (place / "mine").read_text() == "four"
    (place / "mine").unlink()
    discard(place)
    assert not place.exists()


def test_a_marked_directory_inside_another_has_a_list_of_its_own(tmp_path):
    with new_directory(tmp_path / "outer"):
        pass
    with new_directory(tmp_path / "outer" / "steps" / "inner") as temporary:
        (temporary / "file").write_text("")
    assert foreign(tmp_path / "outer") is None
    (tmp_path / "outer" / "steps" / "inner" / "mine").write_text("")
    assert foreign(tmp_path / "outer") == tmp_path / "outer" / "steps" / "inner" / "mine"


@pytest.mark.parametrize("damage", ["", "[]", '{"files": 3}', "{"])
def test_a_directory_whose_marker_is_damaged_is_not_replaced(tmp_path, damage):
    with new_directory(tmp_path / "made") as temporary:
        (temporary / "file").write_text("")
    (tmp_path / "made" / MARKER).write_text(damage)
    with pytest.raises(UserError, match="made"), new_directory(tmp_path / "made"):
        pass
    assert (tmp_path / "made" / "file").exists()


def test_what_appears_while_a_directory_is_written_is_kept(tmp_path):
    with new_directory(tmp_path / "made") as temporary:
        (temporary / "file").write_text("old")

    def replace() -> None:
        with new_directory(tmp_path / "made") as temporary:
            (temporary / "file").write_text("new")
            (tmp_path / "made" / "mine").write_text("mine")

    with pytest.raises(UserError, match="mine"):
        replace()
    assert (tmp_path / "made" / "file").read_text() == "old"
    assert (tmp_path / "made" / "mine").read_text() == "mine"


def test_only_temporary_files_of_rarecs_own_names_are_removed(tmp_path):
    theirs = [tmp_path / ".made.aside-1", tmp_path / ".made.aside-old", tmp_path / ".made.aside-1-abcdef01"]
    for path in theirs:
        path.write_text("mine")
    temporary_path(tmp_path / "made", "1").write_text("half")
    for _ in range(2):
        with new_directory(tmp_path / "made"):
            pass
    assert sorted(tmp_path.iterdir()) == sorted([*theirs, tmp_path / "made"])


# ---- what is read back


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("prepare/items.parquet", "flip"),
        ("ids/id/items.npy", "cut"),
        ("ids/id/model.safetensors", "remove"),
        ("shards/000001.tar", "flip"),
        ("shards/selection.json", "cut"),
        ("evaluation/metrics.json", "remove"),
        ("evaluation/ranks.parquet", "flip"),
        ("bundle/alignment.safetensors", "cut"),
        ("bundle/README.md", "remove"),
    ],
)
def test_a_damaged_file_of_a_finished_stage_is_named_and_the_remedy_makes_it_again(run, file, harm):
    config, root = run
    stage, whole = STAGE_OF[file.split("/")[0]], (root / file).read_bytes()
    if harm == "remove":
        (root / file).unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        (root / file).write_bytes(flipped if harm == "flip" else whole[:middle])
    assert f"rarec {stage} CONFIG --fresh" in refused(config, stage, file)


def test_a_damaged_report_is_written_again_and_said_so(run):
    config, root = run
    (root / "report" / "report.html").write_text("half")
    lines: list[str] = []
    again = open_run(config)
    again.say = lines.append
    again.make("report")
    assert any("report.html" in line for line in lines)
    assert "RA-Rec" in (root / "report" / "report.html").read_text()


def test_what_a_killed_process_left_beside_the_artefacts_goes_with_the_next_command(run):
    config, root = run
    for name in ("record.json", "resolved.yaml"):
        temporary_path(root / name, "1").write_text("half")
    open_run(config).make("prepare")
    assert not [path.name for path in root.iterdir() if "aside" in path.name]


@pytest.mark.parametrize("name", ["prepare", "ids/id", "shards", "evaluation", "bundle"])
def test_a_manifest_is_sealed_over_its_figures_too(run, name):
    config, root = run
    manifest = read_json(root / name / MANIFEST)
    figure = next(key for key in sorted(manifest) if key not in (*IDENTITY, "hash"))
    write_json(root / name / MANIFEST, {**manifest, figure: "another"})
    refused(config, STAGE_OF.get(name.split("/")[0], "train"), f"{name}/{MANIFEST}")


def test_another_best_step_in_a_trainings_manifest_is_refused(run):
    config, root = run
    manifest = read_json(root / "train" / "per_layer" / MANIFEST)
    write_json(root / "train" / "per_layer" / MANIFEST, {**manifest, "best_step": manifest["best_step"] - 1})
    for stage in ("train", "evaluate", "export"):
        refused(config, stage, f"per_layer/{MANIFEST}", fresh=stage != "train")


def test_a_build_resumes_beside_a_file_of_the_users(run):
    config, root = run
    whole = read_json(root / "shards" / MANIFEST)["hash"]
    unfinish(root / "shards")
    (root / "shards" / "notes.txt").write_text("mine")
    open_run(config).make("shards")
    assert read_json(root / "shards" / MANIFEST)["hash"] == whole
    assert (root / "shards" / "notes.txt").read_text() == "mine"


def test_every_stage_leaves_nothing_that_it_would_not_know_as_its_own(run):
    config, _ = run
    for name in STAGES:
        for stage in open_run(config).stages(name):
            assert foreign(stage.directory) is None
