"""The one runner of stages: currency, resume, fresh, ownership, locks, manifest and record."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rarec.config import RunConfig
from rarec.errors import Stopped, UserError
from rarec.stages.run import Run
from rarec.stages.stage import Built, Stage
from rarec.storage.artefacts import BEGUN, MANIFEST, PROGRESS, read_manifest, write_sealed
from rarec.storage.directories import CHECKED, MARKER
from rarec.storage.files import read_json, write_json

TREE = {
    "prepare": {
        "interactions": {"path": "log.csv", "user": "user", "item": "item", "time": "time"},
        "items": {"path": "items.csv", "item": "item", "title": "title"},
    },
    "llm": {"path": "-"},
}


class Toy(Stage):
    """Writes its settings to a file."""

    name = "toy"
    summary = ""
    value = 1
    during: Callable[[Path], Any] | None = None
    stop = ""

    def settings(self):
        return {"section": {"value": self.value}}

    def build(self, directory):
        (directory / "value").write_text(str(self.value))
        if self.during is not None:
            self.during(directory)
        return Built({"count": self.value}, stop=self.stop)


class Slow(Toy):
    """The same, resumable: a step at each try."""

    name = "slow"
    resumable = True
    claims = ("value",)

    def build(self, directory):
        (directory / PROGRESS).mkdir(exist_ok=True)
        (directory / PROGRESS / f"step-{len(list((directory / PROGRESS).iterdir()))}").touch()
        return super().build(directory)


class Dependent(Toy):
    """Made from a toy, and from something outside."""

    name = "dependent"
    outside = "one"

    def inputs(self):
        return {"toy": Toy(self.run)}

    def outside_inputs(self):
        return {"file": self.outside}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(tmp_path, said) -> Run:
    tree = {**TREE, "run": {"dir": str(tmp_path / "run")}}
    return Run(RunConfig.model_validate(tree), say=said.append)


def fail(directory: Path) -> None:
    raise RuntimeError("half-way")


def stop(directory: Path) -> None:
    raise Stopped("by a signal")


def everything(root: Path) -> set[str]:
    hidden = (".lock", ".begun.json", CHECKED)
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and not p.name.endswith(hidden)}


@pytest.mark.parametrize("kind", [Toy, Slow])
def test_a_stage_is_built_once_and_left_alone_then(run, said, kind):
    stage = kind(run)
    assert not stage.is_done()
    assert stage.make()
    assert stage.is_done()
    manifest = read_manifest(stage.directory, stage.name)
    assert (manifest["settings"], manifest["count"], set(manifest["files"])) == (stage.settings(), 1, {"value"})
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    assert not stage.make()
    assert str(stage.directory) in said[-1]
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before
    assert everything(run.root) == {"resolved.yaml", *(f"{stage.name}/{name}" for name in ("value", MANIFEST, MARKER))}


@pytest.mark.parametrize("kind", [Toy, Slow])
def test_other_settings_are_refused_with_the_field_and_the_way_out(run, kind):
    kind(run).make()
    changed = kind(run)
    changed.value = 2
    with pytest.raises(UserError, match=rf"section\.value: 1 -> 2[^$]*rarec {kind.name} CONFIG --fresh"):
        changed.make()
    assert not changed.is_done()
    assert changed.make(fresh=True)
    assert (changed.directory / "value").read_text() == "2"
    assert not list(run.root.glob(f".{kind.name}.[!l]*"))


@pytest.mark.parametrize("kind", [Toy, Slow])
@pytest.mark.parametrize("event", [fail, stop])
def test_what_is_there_stays_until_its_replacement_is_whole(run, kind, event):
    kind(run).make()
    fresh = kind(run)
    fresh.value, fresh.during = 2, event
    with pytest.raises((RuntimeError, Stopped)):
        fresh.make(fresh=True)
    kept = kind(run)
    assert kept.is_done()
    assert (kept.directory / "value").read_text() == "1"
    fresh.during = None
    assert fresh.make(fresh=True)
    assert (fresh.directory / "value").read_text() == "2"


def test_an_interrupted_build_is_resumed_and_its_notes_go_with_the_end(run):
    stage, steps = Slow(run), []
    stage.during = fail
    for _ in range(2):
        with pytest.raises(RuntimeError):
            stage.make()
        steps.append(len(list((stage.directory / PROGRESS).iterdir())))
    assert steps == [1, 2]
    with pytest.raises(UserError, match="rarec slow CONFIG"):
        stage.require()
    stage.during = None
    assert stage.make()
    assert not (stage.directory / PROGRESS).exists()
    assert not (stage.directory / BEGUN).exists()


def test_an_interrupted_fresh_build_is_resumed_by_fresh_and_given_up_for_other_settings(run):
    Slow(run).make()
    fresh = Slow(run)
    fresh.value, fresh.during = 2, fail
    for steps in (1, 2):
        with pytest.raises(RuntimeError):
            fresh.make(fresh=True)
        assert len(list((run.root / ".slow.fresh" / PROGRESS).iterdir())) == steps
    other = Slow(run)
    other.value = 3
    assert other.make(fresh=True)
    assert (other.directory / "value").read_text() == "3"
    assert not (run.root / ".slow.fresh").exists()


def test_a_build_begun_with_other_settings_is_refused(run):
    begun = Slow(run)
    begun.during = fail
    with pytest.raises(RuntimeError):
        begun.make()
    other = Slow(run)
    other.value = 2
    with pytest.raises(UserError, match=r"section\.value: 1 -> 2"):
        other.make()


def test_what_is_refused_before_anything_is_built_leaves_nothing_behind(run):
    class Picky(Slow):
        def build(self, directory):
            raise UserError("the batch is too small", "raise train.batch_size")

    with pytest.raises(UserError):
        Picky(run).make()
    assert not Picky(run).directory.exists()
    corrected = Slow(run)
    corrected.value = 2
    assert corrected.make()


IN_THE_WAY = {
    "a folder": lambda place, mine: shutil.copytree(mine, place),
    "a folder with a manifest": lambda place, mine: write_json(
        place / MANIFEST, {"kind": "toy", "schema": 99, "files": {"log.csv": "0"}}
    ),
    "a file": lambda place, mine: place.write_text("mine"),
    "a link": lambda place, mine: place.symlink_to(mine),
    "a dangling link": lambda place, mine: place.symlink_to(mine / "nowhere"),
    "a pipe": lambda place, mine: os.mkfifo(place),
}


def state(root: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return bytes, mode and time of every file, but for locks and notes of what was checked."""
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != CHECKED]
    return {str(path): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("kind", [Toy, Slow])
@pytest.mark.parametrize("thing", IN_THE_WAY)
def test_what_has_the_name_of_an_artefact_is_refused_and_kept(run, tmp_path, kind, thing, fresh):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    place = kind(run).directory
    place.parent.mkdir()
    IN_THE_WAY[thing](place, mine)
    before = state(tmp_path)
    with pytest.raises(UserError, match=str(place)) as error:
        kind(run).make(fresh)
    assert error.value.remedy
    assert {name: now for name, now in state(tmp_path).items() if name in before} == before
    assert os.path.lexists(place)
    place.rename(tmp_path / "away")
    place.mkdir()  # an empty folder may be used
    assert kind(run).make(fresh)


@pytest.mark.parametrize("kind", [Toy, Slow])
@pytest.mark.parametrize("name", ["value", MANIFEST])
@pytest.mark.parametrize("thing", ["a link", "an empty folder"])
def test_what_takes_the_place_of_a_file_of_rarecs_is_refused_and_kept(run, tmp_path, kind, name, thing):
    kind(run).make()
    file = kind(run).directory / name
    file.rename(tmp_path / "away")
    file.symlink_to(tmp_path / "away") if thing == "a link" else file.mkdir()
    with pytest.raises(UserError, match=str(file)):
        kind(run).make(fresh=True)
    assert file.is_symlink() if thing == "a link" else file.is_dir()


@pytest.mark.parametrize("kind", [Toy, Slow])
@pytest.mark.parametrize("name", [BEGUN, PROGRESS, f"{PROGRESS}/notes.txt"])
def test_a_file_of_the_users_with_the_name_of_a_builds_note_is_kept(run, kind, name):
    """A resumable stage is built in its place, so rarec itself had notes of these names there until it was finished."""
    kind(run).make()
    mine = kind(run).directory / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert not kind(run).make()
    with pytest.raises(UserError, match=str(mine)):
        kind(run).make(fresh=True)
    assert mine.read_text() == "mine"


def test_a_link_in_the_place_of_a_folder_of_artefacts_is_refused(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run.root.mkdir()
    (run.root / "toy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=str(run.root / "toy")):
        Toy(run, "part").make()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", [f"toy/{MANIFEST}", "record.json"])
def test_a_pipe_in_the_place_of_a_file_is_named_and_nothing_waits_for_it(recorded, name):
    recorded.make("toy")
    path = recorded.root / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=str(path)):
        recorded.make("toy", fresh=name == "record.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"toy": {"seconds": 1}}', b"\xff"])
def test_a_damaged_record_is_named_and_moving_it_away_is_enough(recorded, content):
    recorded.make("toy")
    recorded.record_file.write_bytes(content)
    with pytest.raises(UserError, match=str(recorded.record_file)) as error:
        recorded.make("toy", fresh=True)
    assert str(recorded.record_file) in error.value.remedy
    recorded.record_file.rename(recorded.root / "away.json")
    assert recorded.make("toy", fresh=True)


@pytest.mark.parametrize("name", ["resolved.yaml", "record.json"])
@pytest.mark.parametrize("content", ["{}", "run: {dir: here} # my notes\n", "", None])
def test_a_file_of_the_users_beside_the_artefacts_is_refused_before_anything_is_made(recorded, name, content):
    place = recorded.root / name
    place.parent.mkdir()
    place.mkdir() if content is None else place.write_text(content)
    with pytest.raises(UserError, match=str(place)):
        recorded.make("toy")
    assert [path.name for path in place.parent.iterdir()] == [name]


def test_a_stage_knows_what_it_was_made_from(run, monkeypatch):
    with pytest.raises(UserError, match="rarec toy CONFIG"):
        Dependent(run).make()
    Toy(run).make()
    dependent = Dependent(run)
    dependent.make()
    recorded = read_manifest(dependent.directory, "dependent")["made_from"]
    assert recorded == {"toy": Toy(run).hash, "file": "one"}
    dependent.outside = "two"
    assert dependent.is_done()  # manifests alone do not tell
    with pytest.raises(UserError, match="another file"):
        dependent.make()
    monkeypatch.setattr(Toy, "value", 2)
    Toy(run).make(fresh=True)
    monkeypatch.setattr(Dependent, "value", 1)
    assert not Dependent(run).is_done()
    with pytest.raises(UserError, match="another toy"):
        Dependent(run).make()


def test_a_cheap_stage_is_rebuilt_where_it_was_made_otherwise(run):
    class Page(Toy):
        cheap = True

    Page(run).make()
    page = Page(run)
    page.value = 2
    assert page.make()
    assert (page.directory / "value").read_text() == "2"


def test_a_stage_that_was_told_to_stop_at_its_end_is_whole(run):
    stage = Toy(run)
    stage.stop = "stopped by a signal"
    with pytest.raises(Stopped, match="signal"):
        stage.make()
    assert stage.is_done()


def test_a_manifest_of_another_version_names_the_way_out(run):
    stage = Toy(run)
    stage.make()
    manifest = read_json(stage.directory / MANIFEST)
    write_json(stage.directory / MANIFEST, {**manifest, "schema": 1})
    with pytest.raises(UserError, match=r"schema 1[^$]*toy away"):
        stage.make()


def test_shared_artefacts_have_a_name_by_what_shapes_them(run, tmp_path):
    class Common(Toy):
        shareable = True

    tree = {**TREE, "run": {"dir": str(tmp_path / "run"), "shared": str(tmp_path / "shared")}}
    first, second = (Common(Run(RunConfig.model_validate(tree))) for _ in range(2))
    assert first.directory == second.directory
    assert first.directory.parent == tmp_path / "shared"
    second.value = 2
    assert first.directory != second.directory
    assert Toy(first.run).directory == tmp_path / "run" / "toy"


@pytest.fixture
def recorded(run, monkeypatch) -> Run:
    """A run whose stages are toys."""
    monkeypatch.setattr("rarec.stages.run.STAGES", {"toy": Toy})
    return run


def test_a_stage_that_was_built_in_part_elsewhere_names_both_places(recorded):
    recorded.make("toy")
    here = read_json(recorded.record_file)["toy"]
    assert {"seconds", "hardware", "ranks", "version", "commit"} == set(here)
    other = {**here, "seconds": 100.0, "hardware": "Another CPU", "commit": "0123"}
    write_sealed(recorded.record_file, {"toy": other})
    (recorded.directory("toy") / MANIFEST).unlink()
    (recorded.directory("toy") / "value").unlink()
    recorded.make("toy")
    noted = read_json(recorded.record_file)["toy"]
    del other["seconds"]
    assert {**noted, "seconds": 0} == {**here, "seconds": 0, "earlier": [other]}
    assert noted["seconds"] > 100
    recorded.make("toy", fresh=True)
    assert "earlier" not in read_json(recorded.record_file)["toy"]


def test_what_is_up_to_date_is_not_recorded_again(recorded):
    assert recorded.make("toy")
    before = recorded.record_file.read_text()
    assert not recorded.make("toy")
    assert recorded.record_file.read_text() == before


def test_the_commit_is_asked_for_before_the_work(recorded, monkeypatch):
    """An hour later the checkout may be another."""
    asked: list[bool] = []
    monkeypatch.setattr(
        "rarec.stages.run.source", lambda: asked.append(Toy(recorded).is_done()) or {"version": "1", "commit": "2"}
    )
    recorded.make("toy")
    assert asked[0] is False


def test_stages_are_named_in_their_order_and_unknown_ones_are_refused(run):
    with pytest.raises(UserError, match="there are: prepare ids neighbours shards train evaluate export report"):
        run.run(["prepare", "bake"])
    with pytest.raises(UserError, match="there are"):
        run.run([])
