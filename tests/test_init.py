"""`rarec init`: a directory to start from; files of the user are never replaced."""

import errno
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rarec.cli import app
from rarec.config import load_config
from rarec.entry import EXAMPLES, write_example
from rarec.errors import EXIT_CODE, UserError
from rarec.storage.directories import new_directory
from rarec.storage.files import write_text
from tests.commands import Command, run_command

ROOT = Path(__file__).parents[1]


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file, by relative path."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_copied_with_what_launchers_need(tmp_path, example):
    config = write_example(tmp_path / "new" / "place", example)
    assert config == tmp_path / "new" / "place" / f"{example}.yaml"
    load_config(config)
    copied = contents(config.parent)
    assert copied.pop(config.name) == (ROOT / "configs" / "runs" / config.name).read_bytes()
    assert copied == {name: (ROOT / name).read_bytes() for name in copied}
    for pattern in ("configs/accelerate/*", "configs/deepspeed/*", "launch/*.py", "launch/slurm/*"):
        assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)} <= set(copied)


def test_a_second_example_is_added_and_equal_files_are_left_alone(tmp_path):
    first = write_example(tmp_path, "mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    write_example(tmp_path, "mine")
    second = write_example(tmp_path, "beauty")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert first.is_file()
    assert second.is_file()


@pytest.mark.parametrize("name", ["mine.yaml", "configs/deepspeed/zero3.json", "launch/slurm/common.sh"])
@pytest.mark.parametrize("content", [b"mine", b"\xff\xfe", None])
def test_a_file_that_differs_is_refused_and_nothing_is_written(tmp_path, name, content):
    place = tmp_path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir() if content is None else place.write_bytes(content)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=str(place)) as error:
        write_example(tmp_path, "mine")
    assert "directory" in error.value.remedy
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["mine.yaml", "configs/deepspeed/zero3.json", "configs/deepspeed", "launch"])
@pytest.mark.parametrize("kind", ["link to nothing", "link", "pipe"])
def test_a_link_or_a_pipe_is_refused_and_stays(tmp_path, name, kind):
    elsewhere = tmp_path / "elsewhere"
    if kind == "link":
        write_example(elsewhere, "mine")  # equal files, but not here
    place = tmp_path / "new" / name
    place.parent.mkdir(parents=True)
    os.mkfifo(place) if kind == "pipe" else place.symlink_to(elsewhere / name)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=str(place)):
        write_example(tmp_path / "new", "mine")
    assert contents(tmp_path) == before
    assert not place.exists() if kind == "link to nothing" else place.is_fifo() or place.is_symlink()


def test_a_place_that_fails_midway_is_as_before(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    written = list[Path]()

    def write(path: Path, text: str) -> None:
        written.append(path)
        write_text(path, text)
        if len(written) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rarec.entry.write_text", write)
    with pytest.raises(OSError, match="No space"):
        write_example(tmp_path, "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["launch"]
    with pytest.raises(OSError, match="No space"):
        written.clear() or write_example(tmp_path / "new" / "place", "mine")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["/proc", "/proc/new", "/proc/self/fd", "/dev/null", "dangling", "dangling/new"])
def test_a_place_where_nothing_can_be_made_is_refused_by_every_command(tmp_path, place):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    write_example(tmp_path, "mine")
    place = str(tmp_path / place)
    config = str(tmp_path / "mine.yaml")
    for words in (["init", place], ["prepare", config, f"run.dir={place}"]):
        outcome = run_command(Command(words, str(tmp_path)))
        assert outcome.code == EXIT_CODE, outcome.stderr
        assert place in outcome.stderr
    for write in (write_text, lambda path, _: make_new(path)):
        with pytest.raises(UserError, match="nothing can be made in"):
            write(Path(place, "x"), "text")
    assert not (tmp_path / "gone").exists()


def make_new(path: Path) -> None:
    with new_directory(path) as directory:
        (directory / "x").touch()


def test_an_unknown_example_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="'yours'") as error:
        write_example(tmp_path / "new", "yours")
    assert all(name in error.value.remedy for name in EXAMPLES)
    assert not (tmp_path / "new").exists()


def test_the_command_prints_the_configuration_and_the_next_command(tmp_path):
    place = tmp_path / "a place"
    printed = CliRunner().invoke(app, ["init", str(place), "--example", "beauty"]).output
    assert str(place / "beauty.yaml") in printed
    assert f"cd '{place}' && rarec run beauty.yaml" in printed
    mine = CliRunner().invoke(app, ["init", str(place)]).output
    assert "rarec run mine.yaml" in mine
