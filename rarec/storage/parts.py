"""A file that takes long to make: its parts wait in a folder beside it, so that the same command resumes.

Each part is a file with its sha256 in its name. In the end the parts are joined to one file, which gets its place by a
link: unlike a rename, that never replaces anything.
"""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rarec.errors import UserError
from rarec.storage.directories import discard, is_there, new_directory
from rarec.storage.files import fsync, open_to_lock, sha256_file, try_lock

PARTS, WHOLE = "parts", "whole"
"""In the folder beside the file: the folder of the parts, and in it the file to which they are joined."""


class Parts:
    """The parts of a file.

    Args:
        out: the file.
        identity: hash of what it is made from; what was begun from anything else is begun anew.

    Attributes:
        folder: beside the file.
        whole: the file to which the parts are joined, before it gets its place.
    """

    def __init__(self, out: Path, identity: str) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.begun-{identity[:16]}")
        self.whole = self.folder / PARTS / WHOLE

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Hold the lock of the folder, which is made if need be; drop what was begun from anything else.

        Raises:
            UserError: another process writes the file.
        """
        _drop_begun(self.out, lambda other: other != self.folder)
        if not self.folder.is_dir() or self.folder.is_symlink():
            with new_directory(self.folder, [f"{PARTS}/"], replace=False):
                pass
        with _locked(self.folder):
            (self.folder / PARTS).mkdir(exist_ok=True)
            yield

    def find(self, name: str) -> Path | None:
        """Return a part that is whole; one that is not is removed."""
        for path in (self.folder / PARTS).glob(f"{name}-*"):
            if path.name.rpartition("-")[2] == sha256_file(path):
                return path
            path.unlink()
        return None

    def add(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a part."""
        temporary = self.folder / PARTS / f"{name}.writing"
        write(temporary)
        fsync(temporary)
        temporary.rename(temporary.with_name(f"{name}-{sha256_file(temporary)}"))

    def all(self, names: list[str]) -> list[Path]:
        """Return the parts of these names.

        Raises:
            UserError: one of them is not whole.
        """
        paths = [path for name in names if (path := self.find(name))]
        if len(paths) < len(names):
            raise UserError(f"a part in {self.folder} was damaged while it was written", "run the same command again")
        return paths

    def place(self) -> None:
        """Give the joined file its place, and remove the folder.

        Raises:
            UserError: something is there.
        """
        try:
            self.out.hardlink_to(self.whole)
        except FileExistsError:
            raise is_there(self.out) from None
        fsync(self.out.parent)
        discard(self.folder)


def refuse_existing(out: Path) -> None:
    """Refuse to make a file that is there; remove what a killed process left of its making.

    Raises:
        UserError: it is there.
    """
    if os.path.lexists(out):
        _drop_begun(out, lambda begun: _is_joined(begun, out))
        raise is_there(out)


def _drop_begun(out: Path, dropped: Callable[[Path], bool]) -> None:
    """Delete folders for parts of a file that no other process writes to, if `dropped` says so."""
    for begun in out.parent.glob(f".{glob.escape(out.name)}.begun*"):
        if begun.is_dir() and dropped(begun):
            with suppress(UserError), _locked(begun):
                discard(begun)


def _is_joined(begun: Path, out: Path) -> bool:
    """Return whether the file is the one that was joined here: the process was killed before it tidied up."""
    whole = begun / PARTS / WHOLE
    return whole.exists() and out.exists() and whole.samefile(out)


@contextmanager
def _locked(begun: Path) -> Iterator[None]:
    with open_to_lock(begun) as handle:
        if not try_lock(handle):
            raise UserError(f"another process writes to {begun}", "wait for it, or name another file: --out")
        yield
