"""Directories that rarec makes: renamed from a temporary one when whole, and marked, so that nothing else is replaced.

The marker in a directory lists the files that rarec has made there. A directory without one, or one that holds anything
else, is the user's: it is neither replaced nor deleted.
"""

import errno
import glob
import os
import shutil
import stat
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

from rarec.errors import UserError
from rarec.storage.files import (
    fsync,
    is_temporary,
    make_directory,
    make_locked,
    read_json,
    remove_stale,
    temporary_path,
    write_json,
)

MARKER = ".rarec.json"
"""File in a directory that rarec has made: the names of its files; `name/` for all that is in a directory."""
CHECKED = ".rarec-checked.json"
"""File beside it: which files were read and checked, so that they are not read again."""


@contextmanager
def new_directory(path: Path, claims: Iterable[str] = (), *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary directory; on success mark it, fsync every file in it and rename it to `path`.

    On an error nothing is left, and `path` is as it was.

    Args:
        path: of the directory to make.
        claims: names of files that will be written there later.
        replace: replace what rarec has made at `path`; otherwise nothing may be there, or come there meanwhile.

    Raises:
        UserError: there is something at `path` that rarec has not made, or a file on the way to it.
    """
    restore_replaced(path)
    if replace:
        refuse_foreign(path)
    elif os.path.lexists(path):
        raise is_there(path)
    make_directory(path.parent)
    remove_stale(path.parent, path.name)
    temporary = temporary_path(path)
    try:
        with make_locked(temporary, directory=True):  # in here, since Ctrl-C may come at once
            yield temporary
            files = (entry.relative_to(temporary).as_posix() for entry in temporary.rglob("*") if not entry.is_dir())
            _mark(temporary, {*claims, *files})
            if replace:
                replace_directory(temporary, path)
            else:
                _place(temporary, path)
    except Exception as error:
        error.add_note(f"while {path} was written")
        raise
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


def _place(new: Path, path: Path) -> None:
    """Fsync a directory and rename it to `path`, where nothing may be."""
    sync_directory(new)
    try:
        new.rename(path)  # fails on anything but an empty directory
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise is_there(path) from None
        raise
    fsync(path.parent)


def restore_replaced(path: Path) -> None:
    """Put a directory back that a process was replacing when it was killed between the two renames."""
    if _replaced(path).exists() and not os.path.lexists(path):
        _replaced(path).rename(path)


def discard(path: Path) -> None:
    """Delete a directory that rarec has made; leave it if it holds anything else, or does not exist."""
    if path.is_dir() and foreign(path) is None:
        remove_stale(path.parent, path.name)
        gone = temporary_path(path, "gone")  # at once: half a directory would look damaged
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Fsync a directory and everything in it; tensors get the mode of the other files, which follows the umask."""
    mode = 0o666 & directory.stat().st_mode  # the umask itself cannot be read without being set
    for tensors in directory.rglob("*.safetensors"):  # their library writes them by a private temporary file
        with suppress(PermissionError):  # begun by another user, in a shared directory
            tensors.chmod(mode)
    for entry in directory.rglob("*"):
        if not entry.is_symlink() and (entry.is_file() or entry.is_dir()):  # opening a pipe would block
            fsync(entry)
    fsync(directory)


def _replaced(path: Path) -> Path:
    return temporary_path(path, "old")


# ---- what rarec has made


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
        if os.path.lexists(directory / name) and (name in new or not is_own(directory / name, name)):
            raise _refusal(directory / name)
    if new:
        _mark(directory, listed | new)


def drop_listed(directory: Path, names: Iterable[str]) -> None:
    """Delete files and folders (`name/`) that a directory's marker lists, and remove them from the list."""
    for own in (MARKER, CHECKED):  # left by a process that was killed while it wrote them
        remove_stale(directory, own)
    listed = _listed(directory) or set()
    present = [name for name in listed.intersection(names) if os.path.lexists(directory / name)]
    for path in (directory / name for name in present if is_own(directory / name, name)):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    if present:  # from now on, a file of such a name is the user's
        _mark(directory, listed.difference(names))


def refuse_foreign(path: Path) -> None:
    """Refuse to replace what rarec has not made.

    Raises:
        UserError: naming it.
    """
    entry = foreign(path)
    if entry is not None:
        raise _refusal(entry)


def foreign(path: Path) -> Path | None:
    """Return the first entry at a path, or inside it, that rarec has not made; None if there is none.

    An empty directory may be used as one's own. A link may not: what it points to is elsewhere.
    """
    if path.is_symlink() or not path.is_dir():
        return path if os.path.lexists(path) else None
    listed = _listed(path)
    if listed is None:
        return None if all(map(is_temporary, path.iterdir())) else path
    return next(_foreign_entries(path, path, listed | {MARKER, CHECKED}), None)


def _foreign_entries(root: Path, directory: Path, listed: set[str]) -> Iterator[Path]:
    """Yield what is below a directory and not listed by the marker of `root`, or by one nearer to the entry."""
    for entry in sorted(directory.iterdir()):
        name = entry.relative_to(root).as_posix()
        if is_temporary(entry) or any(is_own(entry, listed_name) for listed_name in listed & {name, f"{name}/"}):
            continue
        if entry.is_symlink() or not entry.is_dir() or name in listed:  # or a folder where a file should be
            yield entry
        elif (entry / MARKER).exists():
            yield from filter(None, [foreign(entry)])
        else:
            yield from _foreign_entries(root, entry, listed)


def is_own(path: Path, name: str) -> bool:
    """Return whether there is a file or, for a `name/`, a folder, and no link to one: rarec makes no links."""
    return stat.S_IFMT(path.lstat().st_mode) == (stat.S_IFDIR if name.endswith("/") else stat.S_IFREG)


def _listed(directory: Path) -> set[str] | None:
    """Return the names in a directory's marker; None if it has none that can be read."""
    try:
        names = read_json(directory / MARKER)["files"]
    except (UserError, OSError, KeyError, TypeError):
        return None
    return set(map(str, names)) if isinstance(names, list) else None


def _mark(directory: Path, names: Iterable[str]) -> None:
    write_json(directory / MARKER, {"made_by": "rarec", "files": sorted(names)})


def is_there(path: Path) -> UserError:
    """Return the error that something is at a path where nothing may be replaced."""
    return UserError(f"{path} is there already", "move it away, or name another: --out")


def _refusal(path: Path) -> UserError:
    return UserError(f"{path} is there, and rarec has not made it", "move it away, or choose another run.dir")


# ---- what rarec reads


def protect_inputs(inputs: Iterable[tuple[str, str]], replaced: Iterable[Path], searched: Container[str] = ()) -> None:
    """Refuse inputs that a run would replace, and inputs that would include what a run writes.

    Args:
        inputs: the name of a field, and the path or glob that it holds.
        replaced: directories that rarec replaces as a whole.
        searched: fields of which a directory is searched for files.

    Raises:
        UserError: naming the field.
    """
    places = sorted({_real(place) for place in replaced})
    for field, pattern in inputs:
        paths = [pattern] if os.path.lexists(pattern) else glob.iglob(pattern, recursive=True)  # noqa: PTH207
        for path, place in product(map(_real, paths), places):
            around = field in searched and path.is_dir() and place.is_relative_to(path)
            if around or path.is_relative_to(place):
                problem = f"{field}: {path} is {'around' if around else 'inside'} {place}, where rarec replaces files"
                raise UserError(problem, "move it, choose another run.dir, or name tables by a glob: logs/*.csv")


def _real(path: str | Path) -> Path:
    """Return the path without links; not `Path.resolve`, which raises where links go round in a circle."""
    return Path(os.path.realpath(path))
