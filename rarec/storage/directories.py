"""Directories that rarec makes: renamed from a temporary one when whole, and marked, so that nothing else is replaced.

The marker in a directory lists the files that rarec has made there. A directory without one, or one that holds anything
else, is somebody else's: it is neither replaced nor deleted.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rarec.errors import UserError
from rarec.storage.files import fsync, is_temporary, open_to_lock, read_json, remove_stale, temporary_path, write_json

MARKER = ".rarec.json"
"""File in a directory that rarec has made: the names of its files; `name/` stands for all that is in a directory."""
CHECKED = ".rarec-checked.json"
"""File beside it: which files were read and found whole, so that they are not read again."""
_MOVE = "move it away, or choose another run.dir"


@contextmanager
def new_directory(path: Path, claims: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a directory beside `path`; on success mark it, fsync every file in it and rename it to `path`.

    What was at `path` is replaced. On an error nothing is left, and `path` is as it was.

    Args:
        path: of the directory to make.
        claims: names of files that will be written there later.

    Raises:
        UserError: there is something at `path` that rarec has not made, or a file on the way to it.
    """
    refuse_foreign(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:  # /proc; a file on the way
        raise UserError(f"{path.parent} cannot be made: {error.strerror}", "name another folder") from None
    restore_replaced(path)
    remove_stale(path.parent, path.name)
    temporary = temporary_path(path)
    try:
        temporary.mkdir()  # in here, since Ctrl-C may come at once
        with open_to_lock(temporary) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield temporary
            _mark(temporary, {*claims, *(file.relative_to(temporary).as_posix() for file in _files(temporary))})
            replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(new: Path, path: Path) -> None:
    """Fsync a directory and rename it to `path`, in place of what rarec has made there.

    Raises:
        UserError: there is something at `path` that rarec has not made; it stays, and `new` as well.
    """
    sync_directory(new)
    refuse_foreign(path)
    old = _replaced(path)
    if path.exists():
        path.rename(old)
        if foreign(old) is not None:  # written a moment ago
            old.rename(path)
            refuse_foreign(path)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    fsync(path.parent)


def discard(path: Path) -> None:
    """Delete a directory that rarec has made; leave it if it holds anything else, or is not there."""
    if path.is_dir() and foreign(path) is None:
        remove_stale(path.parent, path.name)
        going = _replaced(path)
        path.rename(going)  # at once: half a directory would look damaged
        shutil.rmtree(going, ignore_errors=True)


def claim(directory: Path, names: Iterable[str]) -> None:
    """List files in a directory's marker before they are written there; those that are listed may be written again.

    Args:
        directory: made by `new_directory`.
        names: of the files; `name/` for all that is in a directory.

    Raises:
        UserError: something of such a name is there, and rarec has not made it; or the marker is damaged.
    """
    listed = _listed(directory)
    if listed is None:
        raise UserError(f"{directory / MARKER} is missing or damaged", f"move {directory} away")
    new = set(names) - listed
    for name in sorted(listed | new):
        path = directory / name
        fits = _is_folder if name.endswith("/") else _is_file
        if os.path.lexists(path) and (name in new or not fits(path)):
            raise _refusal(path)
    if new:
        _mark(directory, listed | new)


def drop_listed(directory: Path, names: Iterable[str]) -> None:
    """Delete files and folders (`name/`) that a directory's marker lists, and remove them from the list."""
    for own in (MARKER, CHECKED):  # left by a process that was killed while it wrote them
        remove_stale(directory, own)
    listed = _listed(directory) or set()
    there = [name for name in listed.intersection(names) if os.path.lexists(directory / name)]
    for name in there:
        path = directory / name
        if name.endswith("/"):
            shutil.rmtree(path, ignore_errors=True)  # it leaves links and files
        elif _is_file(path):
            path.unlink()
    if there:  # from now on, a file of such a name is the user's
        _mark(directory, listed.difference(names))


def refuse_foreign(path: Path) -> None:
    """Refuse to replace what rarec has not made.

    Raises:
        UserError: naming it.
    """
    found = foreign(path)
    if found is not None:
        raise _refusal(found)


def foreign(path: Path) -> Path | None:
    """Return the first thing at a path, or inside it, that rarec has not made; None if there is none.

    An empty directory may be used as one's own. A link may not: what it points to is elsewhere.
    """
    if path.is_symlink() or not path.is_dir():
        return path if os.path.lexists(path) else None
    listed = _listed(path)
    if listed is None:
        return None if all(map(is_temporary, path.iterdir())) else path
    return _foreign_in(path, path, listed)


def restore_replaced(path: Path) -> None:
    """Put a directory back that a process was replacing when it was killed between the two renames."""
    if _replaced(path).exists() and not os.path.lexists(path):
        _replaced(path).rename(path)


def restore_all_replaced(directory: Path) -> None:
    """Put back every directory inside one that was being replaced; see `restore_replaced`."""
    for temporary in directory.glob(".*.aside-old-*"):
        if is_temporary(temporary):
            restore_replaced(directory / temporary.name[1:].partition(".aside-old-")[0])


def sync_directory(directory: Path) -> None:
    """Fsync a directory and everything in it; tensors get the mode of the other files, which follows the umask."""
    mode = 0o666 & directory.stat().st_mode  # the umask itself cannot be read without being set
    for tensors in directory.rglob("*.safetensors"):  # written by way of a private temporary file
        with suppress(PermissionError):  # begun by another user, in a shared directory
            tensors.chmod(mode)
    for entry in directory.rglob("*"):
        if not entry.is_symlink() and (entry.is_file() or entry.is_dir()):  # opening a pipe would block
            fsync(entry)
    fsync(directory)


def _foreign_in(root: Path, directory: Path, listed: set[str]) -> Path | None:
    """Return the first file below a directory that the marker of `root`, or one nearer to the file, does not list."""
    for entry in sorted(directory.iterdir()):
        name = entry.relative_to(root).as_posix()
        if (f"{name}/" in listed and _is_folder(entry)) or is_temporary(entry):
            continue
        if entry.is_symlink() or not entry.is_dir():
            if (name in (MARKER, CHECKED) or name in listed) and _is_file(entry):
                continue
            return entry
        if name in listed:  # a folder, even an empty one, where a file should be
            return entry
        marked = (entry / MARKER).exists()
        found = foreign(entry) if marked else _foreign_in(root, entry, listed)
        if found is not None:
            return found
    return None


def _listed(directory: Path) -> set[str] | None:
    """Return the names in a directory's marker; None if it has none that can be read."""
    try:
        names = read_json(directory / MARKER)["files"]
    except (UserError, OSError, KeyError, TypeError):
        return None
    return set(map(str, names)) if isinstance(names, list) else None


def _mark(directory: Path, names: Iterable[str]) -> None:
    write_json(directory / MARKER, {"made_by": "rarec", "files": sorted(names)})


def _is_file(path: Path) -> bool:
    """Return whether there is a file, and no link to one: rarec makes no links."""
    return stat.S_ISREG(path.lstat().st_mode)


def _is_folder(path: Path) -> bool:
    """Return whether there is a folder, and no link to one."""
    return stat.S_ISDIR(path.lstat().st_mode)


def _files(directory: Path) -> Iterator[Path]:
    return (entry for entry in directory.rglob("*") if not entry.is_dir())


def _refusal(path: Path) -> UserError:
    return UserError(f"{path} is there, and rarec has not made it", _MOVE)


def _replaced(path: Path) -> Path:
    return temporary_path(path, "old")
