"""Write the shards. Each tar is complete or absent, so that an interrupted stage resumes with the missing ones.

Samples are computed shard by shard in the thread of the model; worker threads pack, hash and flush earlier shards.

Shape letters: S samples.
"""

import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rarec.data.shards.checks import index_tar
from rarec.data.shards.index import (
    ENTRY,
    INDEX,
    Entries,
    open_index,
    split_by_shard,
    tar_name,
    write_index,
)
from rarec.data.shards.samples import Sample, write_shard
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.storage.artefacts import Manifest, read_sealed, write_manifest, write_sealed
from rarec.storage.files import read_json, remove_stale, sha256_file

MakeSamples = Callable[[range], Iterable[Sample]]
"""Compute the samples at a range of places, in order."""
Say = Callable[[str], None]
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
PROGRESS = ".progress"


def write_shards(
    directory: Path,
    total: int,
    per_shard: int,
    make: MakeSamples,
    identity: str,
    writers: int = 2,
    world: World = SINGLE,
) -> list[dict[str, Any]]:
    """Write samples 0 to total-1 as tars with an index; skip tars that an interrupted run with this identity completed.

    An error in `make` or in a writer ends the run after the tars in progress; they and all earlier ones are kept.

    Args:
        directory: directory of the shards.
        total: number of samples.
        per_shard: samples per tar.
        make: compute samples; called in this thread, one shard after the other.
        identity: hash of everything that determines the samples.
        writers: tars written in parallel; at most one more is in memory.
        world: processes that share the tars; the main process writes the index.

    Returns:
        The records of all shards, for the manifest.
    """
    progress, shards = _Progress(directory, identity), range(-(-total // per_shard))
    (directory / PROGRESS).mkdir(parents=True, exist_ok=True)
    world.run_on_main(lambda: remove_stale(directory))

    def write(job: tuple[int, list[Sample]]) -> None:
        record, rows_S = write_shard(directory / tar_name(job[0]), job[1], job[0])
        progress.write(job[0], record, rows_S)

    # Rank 0 decides for all: another machine may not list yet what was written a moment ago.
    mine = world.run_on_all(lambda: [at for at in shards if world.is_main and not progress.holds(at)])
    missing = json.loads(world.exchange(json.dumps(mine))[0])
    for _ in _in_threads(write, _compute(make, world, missing, total, per_shard), writers):
        pass
    world.barrier()
    world.run_on_main(lambda: write_index(directory, map(progress.rows, shards), total))
    return [progress.record(shard) for shard in shards]


def repair_shards(
    directory: Path,
    manifest: Mapping[str, Any],
    broken: Container[str],
    total: int,
    per_shard: int,
    make: MakeSamples,
    say: Say,
    writers: int = 2,
) -> list[dict[str, Any]]:
    """Rewrite the broken tars, and the index if it or a tar is broken.

    Args:
        directory: directory of the shards.
        manifest: manifest before the repair.
        broken: names of broken files.
        total: number of samples.
        per_shard: samples per tar.
        make: see `write_shards`.
        say: print one line to the user.
        writers: tars written in parallel.

    Returns:
        The records of all shards, for the manifest.
    """
    records, shards = dict(enumerate(manifest["shards"])), range(-(-total // per_shard))
    missing = [shard for shard in shards if shard not in records or tar_name(shard) in broken]
    rows: dict[int, Entries] = {}

    def write(job: tuple[int, list[Sample]]) -> tuple[int, dict[str, Any], Entries]:
        return job[0], *write_shard(directory / tar_name(job[0]), job[1], job[0])

    remove_stale(directory)
    samples = _compute(make, SINGLE, missing, total, per_shard)
    for shard, record, rows_S in _in_threads(write, samples, writers):
        records[shard], rows[shard] = record, rows_S
        say(f"shard {record['file']}: {record['samples']} samples, {record['bytes'] / 1e6:.1f} MB")
    if rows or INDEX in broken:
        intact = [] if INDEX in broken else split_by_shard(open_index(directory, manifest), manifest["shards"])
        known = dict(enumerate(intact)) | rows
        parts = (known[shard] if shard in known else index_tar(directory / tar_name(shard), shard) for shard in shards)
        write_index(directory, parts, total)
    return [records[shard] for shard in shards]


def tar_names(total: int, per_shard: int) -> list[str]:
    """Return the names of all tars."""
    return [tar_name(shard) for shard in range(-(-total // per_shard))]


def files_of(records: Iterable[Mapping[str, Any]], sidecars: Iterable[str]) -> dict[str, str | None]:
    """Return the manifest's `files`: the names of the shards' files, with the sha256 of the tars.

    Args:
        records: records of all tars.
        sidecars: files besides the tars and their index; other files in the directory are not part of the shards.
    """
    return dict.fromkeys([INDEX, *sidecars]) | {record["file"]: record["sha256"] for record in records}


def finish_shards(
    directory: Path,
    records: list[dict[str, Any]],
    settings: Mapping[str, Any],
    made_from: Mapping[str, str],
    sidecars: Iterable[str] = (),
    **figures: Any,
) -> Manifest:
    """Write the manifest, which completes the artefact, then delete the progress notes.

    Args:
        directory: directory of the shards.
        records: records of all tars.
        settings: settings that determine the shards.
        made_from: hashes of their inputs.
        sidecars: files besides the tars and their index; other files in the directory are not part of the shards.
        **figures: further fields of the manifest.

    Returns:
        The manifest.
    """
    figures |= shard_figures(records)
    files = files_of(records, sidecars)
    manifest = write_manifest(directory, "shards", settings=settings, made_from=made_from, files=files, **figures)
    shutil.rmtree(directory / PROGRESS, ignore_errors=True)
    return manifest


def shard_figures(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the manifest's fields about the tars: their records, and the number of samples."""
    return {"shards": records, "samples": sum(record["samples"] for record in records)}


@dataclass(frozen=True)
class _Progress:
    """Notes on completed tars: the record and the index rows of each.

    The rows are stored here instead of read back from the tar, so that resuming costs only the hashes of the tars.
    """

    directory: Path
    identity: str

    def write(self, shard: int, record: dict[str, Any], rows_S: Entries) -> None:
        rows = rows_S.tobytes().hex()
        write_sealed(self._path(shard), {"identity": self.identity, "record": record, "rows": rows})

    def record(self, shard: int) -> dict[str, Any]:
        record: dict[str, Any] = read_json(self._path(shard))["record"]
        return record

    def rows(self, shard: int) -> Entries:
        return np.frombuffer(bytes.fromhex(read_json(self._path(shard))["rows"]), ENTRY)

    def holds(self, shard: int) -> bool:
        """Return True if the shard is complete and matches this run."""
        tar, path = self.directory / tar_name(shard), self._path(shard)
        if not tar.is_file() or not path.is_file():
            return False
        try:
            note = read_sealed(path, "")
        except UserError:  # torn: the tar is written again
            return False
        return bool(note.get("identity") == self.identity and sha256_file(tar) == note["record"]["sha256"])

    def _path(self, shard: int) -> Path:
        return self.directory / PROGRESS / f"{shard:06d}.json"


def _in_threads(work: Callable[[_Job], _Result], jobs: Iterable[_Job], threads: int) -> Iterator[_Result]:
    """Yield results as they complete; the next job is created while at most `threads` are running."""
    under_way: set[Future[_Result]] = set()
    with ThreadPoolExecutor(threads) as pool:
        for job in jobs:
            if len(under_way) == threads:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            under_way.add(pool.submit(work, job))
        yield from (future.result() for future in under_way)


def _compute(
    make: MakeSamples, world: World, shards: Sequence[int], total: int, per_shard: int
) -> Iterator[tuple[int, list[Sample]]]:
    """Yield the samples of this rank's shards; those of other ranks are computed to stay in step, and dropped."""
    world.report("writing shards")  # the title of the bar over the shards
    for is_own, shard in world.split_in_lockstep(shards):
        world.report(f"computing {tar_name(shard)}")
        samples = list(make(range(total)[shard * per_shard : (shard + 1) * per_shard]))
        if is_own:
            yield shard, samples
