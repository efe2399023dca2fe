"""Killed or out of disk at any moment, new versions and results leave the old ones whole, and nothing half-made."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rarec
from rarec.bundle.users import recommend_all
from rarec.entry import open_run
from rarec.export import write_targets
from tests.processes import be_killed_at_change
from tests.ranks import START
from tests.recommending import with_items

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'rarec'; from rarec.__main__ import main; main()"]


@pytest.fixture
def place(finished, tmp_path) -> Path:
    """A folder with a bundle, a log and new items."""
    run = open_run(finished)
    shutil.copytree(run.directory("export"), tmp_path / "bundle")
    shutil.copy(str(run.config.prepare.interactions.path), tmp_path / "log.csv")
    (tmp_path / "new.csv").write_text("item,title,brand\nn1,lamp,\n")
    return tmp_path


def act(what: str, place: Path) -> None:
    recommender = rarec.load(place / "bundle")
    if what == "add":
        with_items(place / "bundle", place / "new.csv", place / "out")
    elif what == "vectors":
        write_targets(recommender, ["vectors"], place / "out", say=lambda line: None)
    else:
        recommend_all(recommender, str(place / "log.csv"), place / "out.parquet", 3)


def killed(what: str, place: Path, number: int) -> None:
    be_killed_at_change(number, place)
    act(what, place)


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir() if not path.name.startswith(".")}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["add", "vectors", "all"])
def test_a_kill_at_any_change_leaves_the_old_and_the_same_command_makes_the_new(place, what):
    made, number = "out.parquet" if what == "all" else "out", 0
    before = rarec.load(place / "bundle").bundle.manifest["hash"]
    while True:
        number += 7
        process = START.Process(target=killed, args=(what, place, number))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert made not in names(place) or number > 7
        assert rarec.load(place / "bundle").bundle.manifest["hash"] == before
        if made in names(place):  # renamed already: whole
            shutil.rmtree(place / made) if what != "all" else (place / made).unlink()
    assert number > 7
    assert names(place) == {"bundle", "log.csv", "new.csv", made}
    assert not [path for path in place.iterdir() if path.name.startswith(".")], "what was aside is tidied up"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["items", "add", "bundle", "new.csv", "--out", "out"],
        ["recommend", "bundle", "--all", "--log", "log.csv", "--out", "out.parquet"],
    ],
)
def test_a_full_disk_is_one_message_and_leaves_nothing(place, arguments):
    before = names(place)
    limit = 2_000  # bytes of a file, which is what a full disk says, too
    result = subprocess.run(
        [*COMMAND, *arguments],
        cwd=place,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env={**os.environ, "TMPDIR": str(place.parent), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert result.returncode == 2, result.stderr
    assert "free space" in result.stderr
    assert names(place) == before
