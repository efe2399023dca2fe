"""Messages name the cause and the field that mends it: each is provoked, and its remedy typed."""

import re
import resource
import subprocess
import sys

import pytest
import yaml

from rarec.config import load_config
from rarec.errors import UserError
from tests.commands import Command, run_command
from tests.tiny_runs import CONFIG


@pytest.fixture
def place(tmp_path):
    rows = [f"u{user},i{item},{10 * user + item}" for user in range(20) for item in range(8)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *rows, ""]))
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"i{item},T{item}\n" for item in range(8)))
    tree = yaml.safe_load(CONFIG)
    tree["prepare"] = {
        "interactions": {"path": "log.csv", "user": "user", "item": "item", "time": "time"},
        "items": {"path": "items.csv", "item": "item", "title": "title"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def prepare(place, *overrides: str) -> str:
    """Return the error message of `rarec prepare`; nothing if it succeeds."""
    outcome = run_command(Command(["prepare", "config.yaml", *overrides], str(place)))
    assert outcome.code in (0, 2), outcome.stderr
    return outcome.stderr[outcome.stderr.find("error: ") :] if outcome.code else ""


def test_too_little_memory_is_named_by_its_field(place):
    message = prepare(place, "prepare.memory=1KB")
    assert message.startswith("error: prepare.memory is too small")
    assert "cannot be read" not in message
    assert "SET " not in message
    (remedy,) = re.findall(r"raise prepare\.memory \(such as to (\w+)\)", message)
    assert not prepare(place, f"prepare.memory={remedy}")


def test_a_url_as_scratch_is_refused_where_a_folder_of_that_name_would_be_made(place):
    message = prepare(place, "prepare.scratch=s3://me:hunter2@bucket/x")
    assert message.startswith("error: field `prepare.scratch`: a URL")
    assert not (place / "s3:").exists()
    assert not prepare(place, "prepare.scratch=folder")


@pytest.mark.parametrize(("end", "other"), [("\n", "\r\n"), ("\r\n", "\n"), ("\n", "\r"), ("\r\n", "\r")])
@pytest.mark.parametrize("line", [1, 100])
def test_mixed_line_ends_are_named_by_the_line(place, end, other, line):
    path = place / "log.csv"
    rows = path.read_text().splitlines()
    path.write_bytes("".join(row + (other if number == line else end) for number, row in enumerate(rows, 1)).encode())
    message = prepare(place)
    different = 2 if line == 1 else line
    assert f"log.csv: line {different} ends with {(end if line == 1 else other)!r}" in message
    command = message.partition("alike: ")[2].strip()
    subprocess.run(command, shell=True, check=True, cwd=place)
    assert not prepare(place)


@pytest.mark.parametrize("field", ["temperature", "align_temperature"])
@pytest.mark.parametrize("value", ["1e-300", "1.0e-9", "1.0e+300"])
def test_a_temperature_that_no_score_survives_is_refused_by_name(place, field, value):
    with pytest.raises(UserError, match=rf"field `loss\.{field}`: .*(greater|less) than or equal"):
        load_config(place / "config.yaml", [f"loss.{field}={value}"])
    assert load_config(place / "config.yaml", [f"loss.{field}=0.05"])


WRITES = """
import sys; from pathlib import Path; from rarec.console.last_resort import guarded
from rarec.storage.directories import new_directory; from rarec.storage.files import write_text
def folder(path):
    with new_directory(path) as directory:
        (directory / "x").write_bytes(bytes(9_000_000))
path = Path(sys.argv[1])
guarded(lambda: folder(path) if sys.argv[2] == "folder" else write_text(path, "x" * 9_000_000))
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("disk", ["full", "limit"])
def test_a_full_disk_is_named_by_what_was_being_written(tmp_path, kind, disk):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    place = tmp_path / "disk"
    place.mkdir()
    if disk == "full":
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount a small disk")
    try:
        words = [sys.executable, "-c", WRITES, str(place / "bundle-2"), kind]
        result = subprocess.run(
            words, capture_output=True, text=True, preexec_fn=limit if disk == "limit" else None, check=False
        )
        assert result.returncode == 2, result.stderr
        assert f"while {place / 'bundle-2'} was written" in result.stderr
        assert "free space" in result.stderr
        assert "resume" not in result.stderr
        assert not list(place.iterdir())
    finally:
        if disk == "full":
            subprocess.run(["umount", str(place)], check=True)
