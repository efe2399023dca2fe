"""Artefacts: written to a temporary directory and renamed whole; the earlier version survives every failure."""

import multiprocessing
import os
import shutil
import sys
import time
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from rarec.errors import UserError
from rarec.storage.artefacts import check_files, check_origin, read_manifest, write_manifest
from rarec.storage.directories import CHECKED, new_directory
from rarec.storage.files import atomic_write, sha256_file, temporary_path, write_json, write_text


def write(directory, text):
    with new_directory(directory) as temporary:
        (temporary / "file").write_text(text)


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "a") as temporary:
        (temporary / "file").write_text(str(1 // 0))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "old"


def interrupt_at(number):
    """Let the line of that number, counted from now on in what writes temporary files, raise KeyboardInterrupt."""
    lines = iter(range(number))

    def trace(frame, event, _):
        if Path(frame.f_code.co_filename).name not in ("directories.py", "files.py", "contextlib.py"):
            return None
        if event == "line" and next(lines, None) is None:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)


def test_an_interrupt_at_any_line_leaves_nothing_temporary(tmp_path):
    before = sys.gettrace()
    for number in range(10_000):
        with suppress(KeyboardInterrupt):
            interrupt_at(number)
            write(tmp_path / "a", "new")
            sys.settrace(before)
            break
        assert not list(tmp_path.glob(".*")), number
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
    assert number > 50
    assert (tmp_path / "a" / "file").read_text() == "new"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    write(tmp_path / "a", "old")
    (tmp_path / "a").rename(temporary_path(tmp_path / "a", "old"))
    temporary_path(tmp_path / "a", "99").mkdir()
    with pytest.raises(RuntimeError), new_directory(tmp_path / "a"):
        raise RuntimeError
    assert (tmp_path / "a" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_manifest_that_was_altered_is_refused(tmp_path):
    manifest = write_manifest(tmp_path, "prepare", settings={"a": 1}, made_from={})
    write_json(tmp_path / "manifest.json", {**manifest, "settings": {"a": 2}})
    with pytest.raises(UserError, match=r"manifest\.json .*seal"):
        read_manifest(tmp_path, "prepare")


def test_figures_do_not_enter_the_hash_and_settings_do(tmp_path):
    def digest(**keywords):
        return write_manifest(tmp_path, "prepare", **keywords)["hash"]

    base = digest(settings={"a": 1}, made_from={}, seconds=1.0)
    assert digest(settings={"a": 1}, made_from={}, seconds=2.0) == base
    assert digest(settings={"a": 2}, made_from={}) != base


@pytest.fixture
def made(tmp_path):
    """An artefact of two files, which were written a minute ago."""
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (time.time() - 60,) * 2)
    write_manifest(tmp_path, "prepare", settings={}, made_from={})
    return tmp_path


def check(directory):
    check_files(directory, read_manifest(directory, "prepare"), remember=True)


def read_by(check, directory, monkeypatch):
    """Return the files that a check reads."""
    read, plain = [], sha256_file
    monkeypatch.setattr("rarec.storage.artefacts.sha256_file", lambda path: read.append(path.name) or plain(path))
    check(directory)
    return read


def test_a_file_is_read_once_while_its_size_time_and_inode_stay(made, monkeypatch):
    assert read_by(check, made, monkeypatch) == ["one", "two"]
    assert read_by(check, made, monkeypatch) == []
    os.utime(made / "one")
    assert read_by(check, made, monkeypatch) == ["one"]
    assert read_by(check, made, monkeypatch) == ["one"], "it was changed a moment ago"
    shutil.copy2(made / "two", made / "copy")
    (made / "copy").replace(made / "two")
    assert "two" in read_by(check, made, monkeypatch)
    assert read_by(lambda made: check_files(made, read_manifest(made, "prepare")), made, monkeypatch) == ["one", "two"]


@pytest.mark.parametrize("note", ["", "[]", '{"one": 5, "two": [3]}', '{"one": [3, 4, 5, "another hash"]}'])
def test_a_note_that_is_damaged_hides_nothing(made, note, monkeypatch):
    (made / CHECKED).write_text(note)
    assert read_by(check, made, monkeypatch) == ["one", "two"]
    assert read_by(check, made, monkeypatch) == []


def test_what_was_altered_is_refused_with_a_note_and_without(made):
    for _ in range(2):
        before = (made / "one").stat()
        (made / "one").write_text("ten")
        with pytest.raises(UserError, match="one"):
            check(made)
        (made / "one").write_text("one")
        os.utime(made / "one", ns=(before.st_atime_ns, before.st_mtime_ns))
        check(made)


def test_changed_settings_are_named_leaf_by_leaf(tmp_path):
    settings = {"split": {"kind": "temporal", "share": 1}}
    manifest = write_manifest(tmp_path, "prepare", settings=settings, made_from={})
    check_origin(tmp_path, manifest, settings, {})
    with pytest.raises(UserError, match=r"split\.share: 1 -> 2"):
        check_origin(tmp_path, manifest, {"split": {"kind": "temporal", "share": 2}}, {})


def test_no_json_that_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("locks")
def test_what_a_killed_writer_left_is_dropped_and_what_a_living_one_writes_stays(tmp_path):
    temporary_path(tmp_path / "a", "1").write_text("half")
    temporary_path(tmp_path / "d", "1").mkdir()
    for mine in (".notes", ".a.aside-1"):
        (tmp_path / mine).write_text("mine")
    with atomic_write(tmp_path / "a") as file, new_directory(tmp_path / "d") as directory:
        file.write(b"first")
        (directory / "file").write_text("first")
        with multiprocessing.get_context("fork").Pool(1) as pool:
            pool.apply(write_both, (tmp_path,))
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == (tmp_path / "d" / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.aside-1", ".notes", "a", "d"]


def write_often(directory, number):
    for _ in range(100):
        write_text(directory / "a", str(number))


@pytest.mark.usefixtures("locks")
def test_writers_of_one_name_at_once_remove_nothing_of_each_other(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool, ThreadPool(4) as threads:
        written = [some.starmap_async(write_often, [(tmp_path, n) for n in range(4)]) for some in (pool, threads)]
        for some in written:
            some.get(60)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() in "0123"


def test_what_another_user_left_fails_no_write(tmp_path):
    theirs = temporary_path(tmp_path / "d", "1")
    theirs.mkdir()
    for file in (temporary_path(tmp_path / "a", "1"), theirs / "file"):
        file.write_text("theirs")
        file.chmod(0o444)
    theirs.chmod(0o555)
    tmp_path.chmod(0o777)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(write_both_as_nobody, (tmp_path,))
    assert (tmp_path / "a").read_text() == (tmp_path / "d" / "file").read_text() == "second"
    assert (theirs / "file").read_text() == "theirs"


def write_both_as_nobody(root):
    os.chdir(root)  # the directories above it are closed to another user
    if os.geteuid() == 0:
        os.seteuid(65534)
    write_both(Path())


def write_both(root):
    write_text(root / "a", "second")
    write(root / "d", "second")
