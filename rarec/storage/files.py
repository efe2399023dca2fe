"""Files written to temporary ones and renamed when whole, and locks that the kernel frees with their process."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from rarec.errors import UserError


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading; refuse a pipe or a device, which could block forever.

    Raises:
        OSError: it is missing, may not be read, or is not a file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise FileExistsError(errno.EEXIST, "it is not a file", str(path))


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, read in blocks."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file beside `path`; fsync it and rename it to `path`. On an error nothing is left.

    What a killed process left under the same name is removed.
    """
    remove_stale(path.parent, path.name)
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def temporary_path(path: Path, tag: str = "") -> Path:
    """Return where `path` is kept for the time being: hidden, beside it, by a name that nobody else gives to a file.

    Args:
        path: of the file or directory.
        tag: tells what it holds; by default, what this process is writing.
    """
    tag = tag or str(os.getpid())
    return path.with_name(f".{path.name}.aside-{tag}-{_check(path.name, tag)}")


def is_temporary(path: Path) -> bool:
    """Return whether a name is one of `temporary_path`."""
    found = re.fullmatch(r"\.(.+)\.aside-(\w+)-(\w+)", path.name, re.DOTALL)
    return found is not None and found[3] == _check(found[1], found[2])


def _check(name: str, tag: str) -> str:
    """Return digits that tell a temporary file of rarec from a file of the user's with a similar name."""
    return hashlib.sha256(f"rarec {name} {tag}".encode(errors="surrogateescape")).hexdigest()[:8]


def remove_stale(directory: Path, name: str | None = None) -> None:
    """Remove what killed processes left, under one name or all; a living process holds a lock on its own."""
    for temporary in directory.glob(f".{'*' if name is None else glob.escape(name)}.aside-*"):
        # gone by now, or another user's: tidying up must not fail a write
        with suppress(OSError), open_to_lock(temporary) as handle:
            if is_temporary(temporary) and try_lock(handle):
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


@contextmanager
def open_to_lock(path: Path) -> Iterator[int]:
    """Yield a handle of an existing file or directory to lock it by; closing it at the end frees the lock.

    A file is opened for writing, because NFS grants an exclusive lock to writers only. A directory cannot be opened
    so: on NFS its lock holds on this machine alone.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def lock_file(path: Path) -> Iterator[int]:
    """Yield a handle of a lock file, created if need be; closing it at the end frees the lock.

    The file is never deleted: another process may be waiting for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # a link may lead anywhere
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a lock file, waiting for it if another process or thread holds it."""
    with lock_file(path) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def try_lock(handle: int) -> bool:
    """Lock an open file or directory and return True, or return False if another process holds the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file to a temporary file, fsync it, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a JSON file to a temporary file, and rename it. NaN and infinity, which JSON lacks, are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str = "restore it from a copy, or rebuild what it belongs to") -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, cannot be read, or is not JSON; the message names it.
    """
    try:
        with open_file(path) as file:
            return json.loads(file.read().decode())
    except FileNotFoundError:
        problem = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise UserError(f"{path} {problem}", remedy) from None
    except PermissionError:
        raise  # it is not damaged: `machine_trouble` says so
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", remedy) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}", remedy) from None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file; bytes that are not UTF-8 are replaced."""
    with open_file(path) as file:
        return file.read().decode("utf-8", errors="replace").splitlines()
