"""Files that are renamed from a temporary one when whole, locks that end with their process, and hashes of users."""

import errno
import fcntl
import glob
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from rarec.errors import UserError

KEY = "user.key"
"""File in a folder with the key of the users' hashes in its files: without it, nobody can tell who they are."""


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


@contextmanager
def creating(path: Path) -> Iterator[None]:
    """Name the place where the context can create nothing, as in /proc or behind a link to nothing.

    Raises:
        UserError: it is so.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"nothing can be made in {path}: {error.strerror}", "name another folder") from None


def make_directory(path: Path) -> None:
    """Make a directory and its parents, unless they exist.

    Raises:
        UserError: nothing can be made there.
    """
    with creating(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def open_handle(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Yield a handle of a file or directory. Closing it at the end frees its lock."""
    with creating(path.parent) if flags & os.O_CREAT else nullcontext():
        handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def fsync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    with open_handle(path) as handle:
        os.fsync(handle)


# ---- temporary files


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary binary file; fsync it and rename it to `path`. On an error nothing is left.

    What a killed process left under the same name is removed.
    """
    remove_stale(path.parent, path.name)
    temporary = temporary_path(path)
    try:
        with make_locked(temporary) as handle, open(handle, "wb", closefd=False) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except Exception as error:
        error.add_note(f"while {path} was written")  # an error of writing, as on a full disk, names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


@contextmanager
def make_locked(path: Path, *, directory: bool = False) -> Iterator[int]:
    """Make a temporary file or directory and hold its lock, by which `remove_stale` knows that it is being written.

    It is made again where another process found and removed it in the instant before it was locked.
    """
    while True:
        with creating(path.parent):
            path.mkdir() if directory else path.touch()
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY if directory else os.O_RDWR | os.O_TRUNC)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists():
                break
            os.close(handle)
    try:
        yield handle
    finally:
        os.close(handle)


def temporary_path(path: Path, tag: str = "") -> Path:
    """Return a hidden path beside `path`, with a name that nothing but rarec gives to a file.

    Args:
        path: of the file or directory.
        tag: names the purpose; by default this thread, which is writing `path`.
    """
    tag = tag or f"{os.getpid()}_{threading.get_ident()}"
    return path.with_name(f".{path.name}.aside-{tag}-{_check_digits(path.name, tag)}")


def is_temporary(path: Path) -> bool:
    """Return whether a name is one of `temporary_path`."""
    parts = re.fullmatch(r"\.(.+)\.aside-(\w+)-(\w+)", path.name, re.DOTALL)
    return parts is not None and parts[3] == _check_digits(parts[1], parts[2])


def _check_digits(name: str, tag: str) -> str:
    return hashlib.sha256(f"rarec {name} {tag}".encode(errors="surrogateescape")).hexdigest()[:8]


def remove_stale(directory: Path, name: str | None = None) -> None:
    """Remove what killed processes left, for one name or all; a living process holds a lock on what it writes."""
    for path in directory.glob(f".{'*' if name is None else glob.escape(name)}.aside-*"):
        # gone by now, or another user's: tidying up must not fail a write
        with suppress(OSError), open_to_lock(path) as handle:
            # its writer may have made it anew between our opening and locking: that one is not ours to remove
            if is_temporary(path) and try_lock(handle) and os.path.samestat(os.fstat(handle), path.stat()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- locks


def open_to_lock(path: Path) -> AbstractContextManager[int]:
    """Open an existing file or directory, to lock it by the handle.

    A file is opened for writing, because NFS grants an exclusive lock to writers only. A directory cannot be opened
    so: on NFS its lock holds on this machine alone.
    """
    return open_handle(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)


def lock_file(path: Path) -> AbstractContextManager[int]:
    """Open a lock file, created if need be, to lock it by the handle.

    The file is never deleted: another process may be waiting for it.
    """
    make_directory(path.parent)
    return open_handle(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)  # a link may lead anywhere


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a lock file; wait while another process or thread holds it."""
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


# ---- text and JSON


def write_text(path: Path, text: str) -> None:
    """Write a text file by `atomic_write`; make its directory if need be."""
    make_directory(path.parent)
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a JSON file by `atomic_write`. NaN and infinity, which JSON lacks, are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(
    path: Path,
    remedy: str = "restore it from a copy, or rebuild what it belongs to",
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """Read a JSON file; `object_hook` as in `json.loads`.

    Raises:
        UserError: it is missing, cannot be read, or is not JSON; the message names it.
    """
    try:
        with open_file(path) as file:
            return json.loads(file.read().decode(), object_hook=object_hook)
    except PermissionError:
        raise  # it is not damaged: `machine_trouble` says so
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        problem = f"is not valid JSON: {error}"
    raise UserError(f"{path} {problem}", remedy)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file; bytes that are not UTF-8 are replaced."""
    with open_file(path) as file:
        return file.read().decode("utf-8", errors="replace").splitlines()


# ---- users in files that others read


def read_key(folder: Path, *, create: bool = False) -> bytes:
    """Return the key of a folder.

    Args:
        folder: of the files.
        create: make one if there is none, readable by its owner alone.

    Raises:
        OSError: it cannot be read, or not be made.
    """
    file = folder / KEY
    if create:
        with suppress(FileExistsError):
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w") as new:
                new.write(secrets.token_hex(32))
    return file.read_bytes()


def hash_user(key: bytes, user: str) -> str:
    """Return what stands for a user."""
    return hmac.new(key, user.encode(), hashlib.sha256).hexdigest()[:32]
