"""Files written aside and renamed whole, directories likewise, and locks that the kernel lets go with their process."""

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from rarec.errors import UserError


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def write_aside(path: Path) -> Iterator[BinaryIO]:
    """Yield a file beside `path`, open for bytes; fsync it and rename it into place. On an error nothing is left.

    What a killed process left there is dropped.
    """
    drop_stale(path.parent, path.name)
    aside = path.with_name(f".{path.name}.aside-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _fsync(path.parent)


def drop_stale(directory: Path, name: str | None = None) -> None:
    """Drop what killed processes left standing aside, of one name or of all; what a living one writes is locked."""
    for aside in directory.glob(f".{'*' if name is None else glob.escape(name)}.aside-*"):
        # gone by now, or another user's: tidying up fails no write
        with suppress(OSError), open_to_lock(aside) as handle:
            if try_lock(handle):
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


@contextmanager
def open_to_lock(path: Path) -> Iterator[int]:
    """Yield a handle of a file or directory to lock it by; closing it at the end lets the lock go.

    A file is open for writing, without which NFS gives no exclusive lock. A directory cannot be: there its lock holds
    on this machine alone.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def lock_file(path: Path) -> Iterator[int]:
    """Yield a handle of a file that is there to be locked, made if need be; closing it at the end lets the lock go.

    The file stays: who would delete it could not know who waits for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is there to be locked; who comes second waits, process or thread.

    The kernel frees it with the process.
    """
    with lock_file(path) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def try_lock(handle: int) -> bool:
    """Lock an open file or directory against other processes, unless one holds it; the kernel frees it with ours."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file aside, fsync it, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Write JSON, aside then renamed. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or torn file is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}", "delete its directory and make it again") from None


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a directory beside `path`; on success fsync every file in it and rename it to `path`.

    Whatever stood at `path` is replaced. On an error nothing is left and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".{path.name}.aside-old")
    if old.exists() and not path.exists():  # killed between the two renames below
        old.rename(path)
    drop_stale(path.parent, path.name)
    aside = path.with_name(f".{path.name}.aside-{os.getpid()}")
    aside.mkdir()
    handle = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield aside
        for entry in aside.rglob("*"):
            _fsync(entry)
        _fsync(aside)
        if path.exists():
            path.rename(old)
        aside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        _fsync(path.parent)
    finally:
        os.close(handle)
        shutil.rmtree(aside, ignore_errors=True)
