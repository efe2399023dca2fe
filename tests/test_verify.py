"""`rarec shards --verify` and `--repair` on the shards of a run, and the tables that they are checked against."""

import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from rarec.cli import command
from rarec.console.last_resort import guarded
from rarec.data.dataset import PreparedDataset
from rarec.data.shards.files import INDEX
from rarec.entry import open_run
from rarec.errors import EXIT_CODE, UserError
from rarec.stages import shard_content
from rarec.stages.run import Run
from rarec.stages.shard_content import ITEM_STATES, SELECTION, TARGET_COUNTS, ShardContent, verify
from rarec.storage.artefacts import MANIFEST
from rarec.storage.directories import MARKER, claim
from rarec.storage.files import read_json
from tests.shards import bytes_of, seal

TAR = "000001.tar"


@pytest.fixture
def shards(finished: Path, tmp_path: Path) -> Path:
    """The shards in a copy of the finished run."""
    shutil.copytree(open_run(finished, []).config.run.dir, tmp_path / "run")
    return tmp_path / "run" / "shards"


def run_of(finished: Path, shards: Path, *overrides: str) -> Run:
    return open_run(finished, [f"run.dir={shards.parent}", *overrides])


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """A command's exit code and what it printed where."""
    code = 0
    with patch.object(sys, "argv", ["rarec", "shards", *arguments]):
        try:
            guarded(command)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, *capsys.readouterr()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a tar": (TAR, flip, rf"{TAR} was altered"),
    "no tar": (TAR, Path.unlink, f"{TAR} is missing"),
    "the index": (INDEX, flip, r"samples\.npy was altered"),
    "item states": (ITEM_STATES, flip, r"item_states\.npy was altered"),
    "no item states": (ITEM_STATES, Path.unlink, r"item_states\.npy is missing"),
    "target counts": (TARGET_COUNTS, flip, r"target_counts\.npy was altered"),
    "half a report": (SELECTION, lambda path: path.write_text("{"), r"selection\.json was altered"),
}


@pytest.mark.parametrize("name", HARMS)
def test_what_is_broken_in_a_run_is_named_and_only_that_is_made_again(finished, shards, name):
    file, harm, told = HARMS[name]
    before = bytes_of(shards)
    harm(shards / file)
    left = {path.name: path.stat().st_ino for path in shards.iterdir()}
    with pytest.raises(UserError, match=told) as error:
        verify(run_of(finished, shards))
    with pytest.raises(UserError) as deep:
        verify(run_of(finished, shards), deep=True)
    assert deep.value.problem == error.value.problem
    assert error.value.problem.count("\n") == 1
    assert "--verify --repair" in error.value.remedy
    assert file in verify(run_of(finished, shards), repair=True)
    assert bytes_of(shards) == before
    again = {path.name for path in shards.iterdir() if left.get(path.name) != path.stat().st_ino}
    assert file in again
    assert again <= {file, INDEX, MANIFEST, MARKER}
    assert verify(run_of(finished, shards)).startswith("5 shards, 288 samples, ")


def test_a_repair_computes_where_the_shards_were_made(finished, shards, monkeypatch):
    """On the ranks' device: elsewhere it would round otherwise, and what was trained would be refused."""
    run, served = run_of(finished, shards), []
    serving = run.engine.serving

    @contextmanager
    def noted(model):
        with serving(model):
            served.append(model)
            yield
            served.append(None)

    monkeypatch.setattr(run.engine, "serving", noted)
    real = ShardContent.samples

    def samples(self, *arguments):
        assert served[-1] is run.llm.backbone
        return real(self, *arguments)

    monkeypatch.setattr(ShardContent, "samples", samples)
    flip(shards / TAR)
    assert TAR in verify(run, repair=True)
    assert served[-1] is None


def test_intact_shards_are_counted_without_loading_a_model(finished, shards):
    run = run_of(finished, shards, "shards.writers=7")
    assert verify(run).startswith("5 shards, 288 samples, ")
    assert verify(run, deep=True).startswith("5 shards, 288 samples, ")
    assert "llm" not in vars(run)
    assert run.stage("shards").require(outside=True)


def test_the_command_prints_a_line_a_problem_and_exits_with_2_until_it_has_repaired(
    finished, shards, capsys, monkeypatch
):
    monkeypatch.chdir(shards.parent.parent)
    where = (str(finished), f"run.dir={shards.parent}", "--verify")
    code, out, _ = call(capsys, *where)
    assert (code, out.startswith("5 shards, 288 samples, ")) == (0, True)
    flip(shards / TAR)
    (shards / "000003.tar").rename(shards / "000009.tar")
    code, out, err = call(capsys, *where)
    assert (code, out) == (EXIT_CODE, "")
    named = [Path(line.split()[0]).name for line in err.splitlines() if ".tar " in line]
    assert named == ["000001.tar", "000003.tar", "000009.tar"]
    code, out, err = call(capsys, *where, "--repair")
    assert (code, "000009.tar" in err) == (EXIT_CODE, True), "it is not known as one of rarec's"
    (shards / "000009.tar").unlink()
    code, out, err = call(capsys, *where, "--repair")
    assert (code, all(name in out for name in ("000001.tar", "000003.tar"))) == (0, True)
    assert call(capsys, *where)[0] == 0
    assert call(capsys, *where, "--deep")[0] == 0
    assert call(capsys, *where[:2], "--repair")[0] == EXIT_CODE
    assert call(capsys, *where, "--fresh")[0] == EXIT_CODE


def test_an_interrupted_repair_is_done_by_the_next_one(finished, shards, monkeypatch):
    before = bytes_of(shards)
    flip(shards / TAR)

    def interrupted(self, places):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardContent, "samples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            verify(run_of(finished, shards), repair=True)
    assert (shards / ".progress").exists()
    assert TAR in verify(run_of(finished, shards), repair=True)
    assert bytes_of(shards) == before
    assert not (shards / ".progress").exists()


@pytest.mark.parametrize("name", ["notes.txt", "my-backup.tar"])
def test_a_strange_file_is_never_dropped(finished, shards, name):
    (shards / name).write_text("mine")
    with pytest.raises(UserError, match=name) as error:
        verify(run_of(finished, shards), repair=True)
    assert error.value.remedy
    assert (shards / name).read_text() == "mine"


def test_notes_of_progress_that_a_kill_left_are_dropped(finished, shards):
    claim(shards, [".progress/"])
    (shards / ".progress").mkdir()
    assert not run_of(finished, shards).make("shards")
    assert not (shards / ".progress").exists()


def from_another_dataset(shards: Path) -> None:
    manifest = read_json(shards / MANIFEST)
    manifest["made_from"]["prepare"] = "0" * 64
    seal(shards, manifest)


def with_a_file_outside(shards: Path) -> None:
    manifest = read_json(shards / MANIFEST)
    manifest["files"]["../../llm/config.json"] = "0" * 64
    seal(shards, manifest)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda shards: (shards / MANIFEST).unlink(), r"manifest\.json"),
        (lambda shards: (shards / MANIFEST).write_text('{"kind"'), r"manifest\.json"),
        (from_another_dataset, "was made from another prepare"),
        (with_a_file_outside, r"manifest\.json .*'\.\./\.\./llm/config\.json'"),
    ],
)
@pytest.mark.parametrize("repair", [False, True])
def test_without_its_manifest_the_shards_can_only_be_rebuilt(finished, shards, harm, told, repair):
    harm(shards)
    with pytest.raises(UserError, match=told) as error:
        verify(run_of(finished, shards), repair)
    assert "rarec shards CONFIG" in error.value.remedy


def test_shards_of_other_settings_are_refused(finished, shards):
    with pytest.raises(UserError, match=r"shards\.share: 0\.7 -> 0\.5"):
        verify(run_of(finished, shards, "shards.share=0.5"))


def test_another_machines_floats_make_other_shards_and_the_user_is_told(finished, shards, monkeypatch):
    flip(shards / TAR)
    real, before = shard_content.text_states, read_json(shards / MANIFEST)
    monkeypatch.setattr(shard_content, "text_states", lambda *args, **more: real(*args, **more) + np.float16(0.5))
    told = verify(run_of(finished, shards), repair=True)
    assert f"{TAR}, {INDEX}" in told
    verify(run_of(finished, shards))
    after = read_json(shards / MANIFEST)
    assert {name for name in after["files"] if after["files"][name] != before["files"][name]} == {TAR, INDEX}
    changing = dict.fromkeys(["hash", "files", "shards", "seal"])
    assert {**after, **changing} == {**before, **changing}
    with pytest.raises(UserError, match="shards"):
        run_of(finished, shards).make("train")


@pytest.mark.parametrize("file", [INDEX, ITEM_STATES, TARGET_COUNTS, TAR])
def test_training_refuses_a_changed_file_by_name(finished, shards, file):
    shutil.rmtree(shards.parent / "train")
    flip(shards / file)
    with pytest.raises(UserError, match=file) as error:
        run_of(finished, shards).make("train")
    assert error.value.remedy


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("users.parquet", truncate),
        ("items.parquet", flip),
        ("interactions.parquet", Path.unlink),
        ("columns/users.start.npy", truncate),
        ("columns/items.title.arrow", flip),
        ("columns/interactions.item_row.npy", Path.unlink),
    ],
)
def test_a_harmed_table_is_refused_by_name(finished, tmp_path, file, harm):
    directory = Path(shutil.copytree(open_run(finished, []).directory("prepare"), tmp_path / "prepare"))
    harm(directory / file)
    with pytest.raises(UserError, match=file) as error:
        PreparedDataset.open(directory)
    assert "rarec prepare CONFIG --fresh" in error.value.remedy


def test_shards_that_lie_elsewhere_are_verified_there(finished, shards):
    with pytest.raises(UserError, match="memory://bucket") as error:
        verify(run_of(finished, shards, "train.stream.remote=memory://bucket"))
    assert error.value.remedy
