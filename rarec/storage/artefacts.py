"""Artefacts: directories written as a whole, each with a manifest that says what it was made from.

A manifest holds `kind`, `schema`, `settings` (the configuration that shaped the artefact), `made_from` (hashes of the
artefacts it was made from), `files` (sha256 of each file), and figures worth keeping. Its `hash` is the sha256 of all
of these but the figures, which may differ between equal runs; its `seal` that of the whole.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from rarec.errors import UserError
from rarec.storage.directories import CHECKED, MARKER, claim, drop_listed, new_directory
from rarec.storage.files import read_json, remove_stale, sha256_file, write_json

SCHEMA = 3
"""Of manifests."""
MAKERS = {"bundle": "export", "checkpoint": "train"}
"""The command that makes a kind of artefact, where it is not the kind's own name."""
MANIFEST = "manifest.json"
BEGUN = ".begun.json"
"""File in a directory whose build can be resumed: the kind, settings and inputs of the manifest to come."""
PROGRESS = ".progress"
"""Directory in there, with what the build needs to resume."""
IDENTITY = ("kind", "schema", "settings", "made_from", "files")
"""The fields of a manifest that its `hash` is of: what other artefacts name it by."""
_FRESH = 2 * 10**9
"""Nanoseconds after its last change within which a file may change again without another time."""
SEAL = "seal"
"""The field of a JSON object with the sha256 of all others."""

Manifest = dict[str, Any]


def sha256_json(value: object) -> str:
    """Return the sha256 of a JSON value in its canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def rebuild(kind: str) -> str:
    """Return the remedy for an artefact that cannot be used: the command that builds it anew."""
    return f"rebuild it: rarec {MAKERS.get(kind, kind)} CONFIG --fresh"


def write_manifest(
    directory: Path,
    kind: str,
    *,
    settings: Mapping[str, Any],
    made_from: Mapping[str, str],
    files: Mapping[str, str | None] | None = None,
    **figures: Any,
) -> Manifest:
    """Hash an artefact's files, write its manifest, and return it.

    Args:
        directory: the artefact, complete but for the manifest.
        kind: of artefact, by convention the name of the stage that makes it.
        settings: the configuration that shaped it, as plain JSON values.
        made_from: the hash of each artefact or model it was made from, by name.
        files: names of its files, with the sha256 of those that are hashed already. Default: every file in the
            directory that is not hidden.
        **figures: counts and other facts for the reader; they do not enter the hash.
    """
    if files is None:
        names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
        files = {name: None for name in names if Path(name).name != MANIFEST and not name.startswith(".")}
    digests = {name: files[name] or sha256_file(directory / name) for name in sorted(files)}
    identity = dict(zip(IDENTITY, (kind, SCHEMA, dict(settings), dict(made_from), digests), strict=True))
    manifest = {**identity, "hash": sha256_json(identity), **figures}
    write_sealed(directory / MANIFEST, manifest)
    return manifest


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its seal, by which damage shows when it is read back."""
    write_json(path, {**value, SEAL: sha256_json(value)})


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """Read what `write_sealed` has written, without the seal.

    Raises:
        UserError: it is missing or damaged; the message names it.
    """
    sealed = read_json(path, remedy)
    plain = {name: value for name, value in sealed.items() if name != SEAL} if isinstance(sealed, dict) else {}
    if not plain or sealed.get(SEAL) != sha256_json(plain):
        raise UserError(f"{path} is damaged: its content does not match its `{SEAL}`", remedy)
    return plain


def read_manifest(directory: Path, kind: str) -> Manifest:
    """Read an artefact's manifest and check its kind, schema and seal.

    Raises:
        UserError: the artefact is missing (the message names the command that makes it), damaged, of another kind or
            schema, or names a file outside of its folder.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{directory} has no {MANIFEST}", f"build it first: rarec {MAKERS.get(kind, kind)} CONFIG")
    plain = read_json(path, rebuild(kind))
    schema = plain.get("schema", SCHEMA) if isinstance(plain, dict) else SCHEMA
    if schema != SCHEMA:  # before the seal, which another may lack
        problem = f"{path} has schema {schema}, this version of rarec reads schema {SCHEMA}"
        raise UserError(problem, f"move {directory} away, and build it again, or use the version that made it")
    manifest = read_sealed(path, rebuild(kind))
    if manifest.get("kind") != kind:
        raise UserError(f"{path} is of kind {manifest.get('kind')!r}, not {kind!r}", rebuild(kind))
    for field in ("settings", "made_from", "files"):
        value = manifest.get(field)
        if not isinstance(value, dict) or not (field == "settings" or set(map(type, value.values())) <= {str}):
            raise UserError(f"{path}: field `{field}` is malformed", rebuild(kind))
    for name in manifest["files"]:
        path_of = PurePosixPath(name)
        if path_of.is_absolute() or str(path_of) != name or "\\" in name or any(n[0] == "." for n in path_of.parts):
            raise UserError(f"{path} names a file outside of its folder: {name!r}", rebuild(kind))
    if manifest.get("hash") != sha256_json({name: manifest[name] for name in IDENTITY}):
        raise UserError(f"{path}: its `hash` is not that of its content", rebuild(kind))
    return manifest


def check_files(
    directory: Path,
    manifest: Mapping[str, Any],
    remedy: str = "",
    *,
    names: Iterable[str] | None = None,
    remember: bool = False,
) -> None:
    """Check files of an artefact against the sha256 in its manifest.

    Args:
        directory: the artefact.
        manifest: as `read_manifest` returns it.
        remedy: for the message; by default, to rebuild the artefact.
        names: the files to check; all of them by default.
        remember: note in the artefact which files were read, and do not read them again while their size, time and
            inode stay as they are.

    Raises:
        UserError: a file is missing or altered.
    """
    files: Mapping[str, str] = manifest["files"]
    remedy = remedy or rebuild(manifest["kind"])
    known = _read_notes(directory) if remember else {}
    checked: dict[str, list[Any]] = {}
    for name in files if names is None else names:
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing", remedy)
        note = [*_stamp(path), files.get(name)]
        if known.get(name) == note:
            continue
        if sha256_file(path) != files.get(name):
            raise UserError(f"{path} was altered", remedy)
        if time.time_ns() - path.stat().st_mtime_ns > _FRESH and _stamp(path) == note[:-1]:
            checked[name] = note
    if remember and checked:
        with suppress(OSError):  # another user's folder: the next command reads them again
            write_json(directory / CHECKED, {**known, **checked})


def note_checks(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Note that the files of an artefact are as its manifest says, which was written a moment ago."""
    notes = {name: [*_stamp(directory / name), digest] for name, digest in manifest["files"].items()}
    write_json(directory / CHECKED, notes)


def _read_notes(directory: Path) -> dict[str, Any]:
    """Return what `check_files` has noted of each file; nothing where that cannot be read."""
    try:
        notes = read_json(directory / CHECKED)
    except (UserError, OSError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _stamp(path: Path) -> list[int]:
    """Return what changes with a file: its size, the time of its last change, its inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def check_origin(
    directory: Path, manifest: Mapping[str, Any], settings: Mapping[str, Any], made_from: Mapping[str, str]
) -> None:
    """Refuse an artefact that was made with other settings, or from other inputs, than those of now.

    Raises:
        UserError: naming the input; or each field with its old and its new value.
    """
    remedy = rebuild(manifest["kind"])
    for name, digest in made_from.items():
        recorded = manifest["made_from"].get(name)
        if recorded != digest:
            change = f"recorded {str(recorded)[:12]}, now {digest[:12]}"
            raise UserError(f"{directory} was made from another {name} ({change})", remedy)
    changed = differences(manifest["settings"], json.loads(json.dumps(dict(settings))))
    if changed:
        problem = f"{directory} was made with other settings: {'; '.join(changed)}"
        elsewhere = "write a further one: --out DIR" if manifest["kind"] == "bundle" else "choose another run.dir"
        raise UserError(problem, f"{remedy}, or {elsewhere}")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return every leaf that differs between two JSON values, as `a.b: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(old) + [key for key in new if key not in old]
        parts = (differences(old.get(key), new.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return [line for part in parts for line in part]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


# ---- builds that can be resumed


def begin_build(directory: Path, final: Path, begun: Manifest, claims: Iterable[str]) -> None:
    """Note what is built in a directory, or check that what was begun there is the same build, which then resumes.

    Args:
        directory: to build in: `final` or, while an artefact there stays in use, one beside it.
        final: place of the artefact.
        begun: the kind, schema, settings and inputs of the manifest to come.
        claims: names of the build's files, `name/` for all in a directory.

    Raises:
        UserError: another build was begun in `final`, or the user has a file of such a name.
    """
    for name in {final.name, directory.name}:
        remove_stale(directory.parent, name)
    if (directory / BEGUN).exists() and not is_only_begun(directory):
        try:
            _check_begun(directory, begun)
        except UserError:
            if directory == final:
                raise  # otherwise it was abandoned, and is replaced
        else:
            claim(directory, claims)
            return
    # Renamed with this file in it: without, it would not be known as rarec's.
    with new_directory(directory, [MANIFEST, f"{PROGRESS}/", *claims]) as temporary:
        write_sealed(temporary / BEGUN, begun)


def is_only_begun(directory: Path) -> bool:
    """Return whether nothing was built yet."""
    return {path.name for path in directory.iterdir()} == {BEGUN, MARKER}


def end_build(directory: Path) -> None:
    """Remove what a finished artefact needs no more."""
    drop_listed(directory, (BEGUN, f"{PROGRESS}/"))


def _check_begun(directory: Path, begun: Manifest) -> None:
    """Refuse to resume another build, naming the difference."""
    recorded = read_sealed(directory / BEGUN, rebuild(begun["kind"]))
    if recorded != begun and recorded.get("schema") == SCHEMA:
        check_origin(directory, recorded, begun["settings"], begun["made_from"])
    if recorded != begun:
        raise UserError(f"{directory / BEGUN} is of another version of rarec", rebuild(begun["kind"]))
