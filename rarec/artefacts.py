"""Artefacts: directories written aside and renamed whole, each with a manifest that names what made it.

A manifest holds `kind`, `schema`, `settings` (the configuration that shaped the artefact), `made_from`
(hashes of the artefacts it was made from), `files` (sha256 of each file), and figures worth keeping.
The artefact's `hash` is the sha256 of all of that but the figures that differ between equal runs.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rarec.errors import UserError
from rarec.files import read_json, sha256_file, write_json

SCHEMA = 1
MAKERS = {"bundle": "export", "checkpoint": "train"}
"""The command that makes a kind of artefact, where it is not the kind's own name."""
MANIFEST = "manifest.json"
IDENTITY = ("kind", "schema", "settings", "made_from", "files")
"""The fields of a manifest that its hash covers."""


def sha256_json(value: object) -> str:
    """The sha256 of a JSON value in one canonical spelling."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(
    directory: Path,
    kind: str,
    *,
    settings: Mapping[str, Any],
    made_from: Mapping[str, str],
    files: Mapping[str, str | None] | None = None,
    **figures: Any,
) -> dict[str, Any]:
    """Hash an artefact's files and write its manifest; returns it.

    Args:
        directory: the artefact, complete but for the manifest.
        kind: what it is, and by convention the name of the stage that makes it.
        settings: the configuration that shaped it, as plain JSON values.
        made_from: the hash of each artefact or model it was made from, by name.
        files: the names of its files, and the sha256 of those that were hashed as they were written; if none are given,
            all that lie there count, but for what is hidden.
        **figures: counts and whatever else a reader should find there; they do not enter the hash.
    """
    if files is None:
        names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
        files = {name: None for name in names if Path(name).name != MANIFEST and not name.startswith(".")}
    identity = {
        "kind": kind,
        "schema": SCHEMA,
        "settings": dict(settings),
        "made_from": dict(made_from),
        "files": {name: files[name] or sha256_file(directory / name) for name in sorted(files)},
    }
    manifest = {**identity, "hash": sha256_json(identity), **figures}
    write_json(directory / MANIFEST, manifest)
    return manifest


def read_manifest(directory: Path, kind: str) -> dict[str, Any]:
    """Read an artefact's manifest, checking its kind and schema.

    Raises:
        UserError: the artefact is missing (naming the command that makes it), torn, or of another kind or schema.
    """
    path, maker = directory / MANIFEST, MAKERS.get(kind, kind)
    if not path.exists():
        raise UserError(f"{directory} has no {MANIFEST}", f"make it first: rarec {maker} CONFIG")
    manifest, remedy = read_json(path), f"make it again: rarec {maker} CONFIG --fresh"
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not a manifest", remedy)
    if manifest.get("kind") != kind or manifest.get("schema") != SCHEMA:
        found = f"{manifest.get('kind')} schema {manifest.get('schema')}"
        raise UserError(f"{path} is {found}, not {kind} schema {SCHEMA}", remedy)
    garbled = [name for name in ("settings", "made_from", "files") if not _maps_names(manifest.get(name), name)]
    if garbled:
        raise UserError(f"{path}: `{garbled[0]}` is not what a manifest holds there", remedy)
    if manifest.get("hash") != sha256_json({name: manifest.get(name) for name in IDENTITY}):
        raise UserError(f"{path} is altered: its hash is not that of what it says", remedy)
    return manifest


def _maps_names(value: Any, field: str) -> bool:
    """Whether it is an object, and but for settings one of texts."""
    return isinstance(value, dict) and (field == "settings" or all(type(each) is str for each in value.values()))


def check_files(directory: Path, manifest: Mapping[str, Any], remedy: str = "") -> None:
    """Check every file of an artefact against its manifest.

    Raises:
        UserError: one is missing or altered; the remedy is to make the artefact again, if none is given.
    """
    for name, digest in manifest["files"].items():
        path = directory / name
        if not path.is_file() or sha256_file(path) != digest:
            maker = MAKERS.get(manifest["kind"], manifest["kind"])
            raise UserError(f"{path} is missing or altered", remedy or f"make it again: rarec {maker} CONFIG --fresh")


def check_made_from(directory: Path, manifest: Mapping[str, Any], **expected: str) -> None:
    """Refuse an artefact that was made from something other than what lies here now."""
    for name, digest in expected.items():
        recorded = manifest["made_from"].get(name)
        if recorded != digest:
            raise UserError(
                f"{directory} was made from another {name} ({str(recorded)[:12]}, but here is {digest[:12]})",
                f"make it again: rarec {MAKERS.get(manifest['kind'], manifest['kind'])} CONFIG --fresh",
            )


def is_current(directory: Path, kind: str, settings: Mapping[str, Any], made_from: Mapping[str, str]) -> bool:
    """Whether a stage's artefact is already there, made by these settings from these inputs.

    Raises:
        UserError: it is there, but made otherwise: made things are replaced only when the user says so.
    """
    if not (directory / MANIFEST).exists():
        return False
    manifest = read_manifest(directory, kind)
    check_made_from(directory, manifest, **made_from)
    changed = differences(manifest["settings"], json.loads(json.dumps(dict(settings))))
    if changed:
        raise UserError(
            f"{directory} was made with other settings: {'; '.join(changed)}",
            f"make it again with: rarec {MAKERS.get(kind, kind)} CONFIG --fresh, or choose another run.dir",
        )
    return True


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Every leaf that differs between two JSON values, as `a.b: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(old) + [key for key in new if key not in old]
        parts = (differences(old.get(key), new.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return [line for part in parts for line in part]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]
