"""Versions of a bundle: a new one is written beside the old one, which stays as it is."""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rarec.bundle.bundle import FIGURES, Bundle
from rarec.errors import UserError
from rarec.storage.artefacts import write_manifest
from rarec.storage.directories import new_directory


def next_version(bundle: Path) -> Path:
    """Return the first free name of a version: `bundle-2` beside `bundle`, then `bundle-3`."""
    bundle = bundle if bundle.name not in ("", "..") else bundle.resolve()  # `.` has no name
    stem, _, number = bundle.name.rpartition("-")
    name, at = (stem, int(number)) if stem and number.isdigit() else (bundle.name, 1)
    while os.path.lexists(path := bundle.with_name(f"{name}-{at + 1}")):
        at += 1
    return path


@contextmanager
def new_version(bundle: Bundle, directory: Path, changed: Collection[str], what: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folder of a new version, which holds all files of the old one but those that change.

    On success its manifest is written, with the old one's figures, and `versions`: what each version changed.

    Args:
        bundle: the old version.
        directory: of the new one.
        changed: names of files, and of folders as `name/`, that are written within the context.
        what: says what the version changes.

    Raises:
        UserError: the folder is there already.
    """
    if os.path.lexists(directory):
        raise UserError(f"{directory} is there already", "name another folder: --out")
    manifest = bundle.manifest
    with new_directory(directory) as temporary:
        for name in manifest["files"]:
            if name not in changed and f"{Path(name).parent}/" not in changed:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.directory / name, temporary / name)
        yield temporary
        made_from = {**manifest["made_from"], "bundle": manifest["hash"]}
        versions = [*manifest.get("versions", []), {**what, "of": manifest["hash"]}]
        figures = {name: manifest[name] for name in FIGURES if name in manifest}
        settings = manifest["settings"]
        write_manifest(temporary, "bundle", settings=settings, made_from=made_from, **figures, versions=versions)
