"""Writing the shards: each tar whole or not there, so that a killed stage goes on where it stopped."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rarec.artefacts import MANIFEST, read_json, sha256_file, write_json, write_manifest
from rarec.data.samples import Sample, write_shard

_PROGRESS = "progress"


def write_shards(
    directory: Path,
    total: int,
    per_shard: int,
    make: Callable[[range], Iterable[Sample]],
    identity: str,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Write samples 0 .. total-1 as tars, skipping those that a killed run of this identity finished.

    Args:
        directory: of the shards.
        total: number of samples.
        per_shard: samples in a tar.
        make: the samples of a range, in order.
        identity: hash of all that shapes the samples.
        say: told of progress.

    Returns:
        The records of all shards, for the manifest.
    """
    progress = directory / _PROGRESS
    progress.mkdir(parents=True, exist_ok=True)
    records = []
    starts = range(0, total, per_shard)
    _drop_beyond(directory, len(starts))
    for index, start in enumerate(starts):
        tar, note = directory / _tar_name(index), progress / f"{index:06d}.json"
        record = _finished(tar, note, identity)
        if record is None:
            record = write_shard(tar, make(range(start, min(start + per_shard, total))))
            write_json(note, {"identity": identity, "record": record})
            say(f"shard {index + 1} of {len(starts)}: {record['samples']} samples, {record['bytes'] / 1e6:.1f} MB")
        records.append(record)
    return records


def finish_shards(
    directory: Path, settings: Mapping[str, Any], made_from: Mapping[str, str], **figures: Any
) -> dict[str, Any]:
    """Write the manifest, which makes the directory an artefact, and drop the notes of progress."""
    shutil.rmtree(directory / _PROGRESS, ignore_errors=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    return write_manifest(directory, "shards", settings=settings, made_from=made_from, **figures)


def _drop_beyond(directory: Path, count: int) -> None:
    """Drop what a killed run left that is no part of this one: more tars than there will be, and what stood aside."""
    wanted = {_tar_name(index) for index in range(count)}
    for path in (*directory.glob("*.tar"), *directory.glob(".*")):
        if path.is_file() and path.name not in wanted:
            path.unlink()


def _tar_name(index: int) -> str:
    return f"{index:06d}.tar"


def _finished(tar: Path, note: Path, identity: str) -> dict[str, Any] | None:
    if not tar.is_file() or not note.is_file():
        return None
    noted = read_json(note)
    whole = noted["identity"] == identity and sha256_file(tar) == noted["record"]["sha256"]
    record: dict[str, Any] = noted["record"]
    return record if whole else None
