"""Writing the shards: each tar whole or not there, so that a killed stage goes on where it stopped.

Samples are made one shard after the other, where the model is; threads pack, hash and flush the shards made before.

Shape letters: S samples.
"""

import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rarec.artefacts import write_manifest
from rarec.data.shards.checks import index_tar
from rarec.data.shards.index import (
    ENTRY,
    INDEX,
    Entries,
    is_tar_name,
    open_index,
    split_by_shard,
    tar_name,
    write_index,
)
from rarec.data.shards.samples import Sample, write_shard
from rarec.files import drop_stale, read_json, sha256_file, write_json
from rarec.world import SINGLE, World

MakeSamples = Callable[[range], Iterable[Sample]]
"""The samples at these places among all, in order."""
Say = Callable[[str], None]
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_PROGRESS = ".progress"


def write_shards(
    directory: Path,
    total: int,
    per_shard: int,
    make: MakeSamples,
    identity: str,
    say: Say,
    writers: int = 2,
    world: World = SINGLE,
) -> list[dict[str, Any]]:
    """Write samples 0 .. total-1 as tars and their index, but for tars that a killed run of this identity finished.

    An error, in `make` or in a writer, ends it after the tars under way; they and all before them stay.

    Args:
        directory: of the shards.
        total: number of samples.
        per_shard: samples in a tar.
        make: called in this thread, for one shard after the other.
        identity: hash of all that shapes the samples.
        say: told of progress.
        writers: tars written at a time; at most so many, and one that is being made, are in memory.
        world: that write together, each its share of the tars; the first writes the index.

    Returns:
        The records of all shards, for the manifest.
    """
    progress, shards = _Progress(directory, identity), range(-(-total // per_shard))
    (directory / _PROGRESS).mkdir(parents=True, exist_ok=True)
    world.run_on_main(lambda: _drop_beyond(directory, len(shards)))

    def write(job: tuple[int, list[Sample]]) -> str:
        record, rows_S = write_shard(directory / tar_name(job[0]), job[1], job[0])
        progress.write(job[0], record, rows_S)
        return _told(record)

    missing = world.run_on_all(lambda: [shard for shard in shards if not progress.holds(shard)])
    for line in _in_threads(write, _made(make, world.split_in_lockstep(missing), total, per_shard), writers):
        say(f"{line} (of {len(shards)} shards)")
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
    """Write the broken tars again, and the index where it or a tar is broken.

    Args:
        directory: of the shards.
        manifest: theirs, before.
        broken: names of files.
        total: number of samples, as `per_shard`, `make`, `say` and `writers` in `write_shards`.
        per_shard: samples in a tar.
        make: called in this thread, for one shard after the other.
        say: told of progress.
        writers: tars written at a time.

    Returns:
        The records of all shards, for the manifest.
    """
    records, shards = dict(enumerate(manifest["shards"])), range(-(-total // per_shard))
    again = [shard for shard in shards if shard not in records or tar_name(shard) in broken]
    rows: dict[int, Entries] = {}

    def write(job: tuple[int, list[Sample]]) -> tuple[int, dict[str, Any], Entries]:
        return job[0], *write_shard(directory / tar_name(job[0]), job[1], job[0])

    _drop_beyond(directory, len(shards))
    made = _made(make, SINGLE.split_in_lockstep(again), total, per_shard)
    for shard, record, rows_S in _in_threads(write, made, writers):
        records[shard], rows[shard] = record, rows_S
        say(_told(record))
    if rows or INDEX in broken:
        old = (
            {}
            if INDEX in broken
            else dict(enumerate(split_by_shard(open_index(directory, manifest), manifest["shards"])))
        )
        known = old | rows
        parts = (known[shard] if shard in known else index_tar(directory / tar_name(shard), shard) for shard in shards)
        write_index(directory, parts, total)
    return [records[shard] for shard in shards]


def finish_shards(
    directory: Path,
    records: list[dict[str, Any]],
    settings: Mapping[str, Any],
    made_from: Mapping[str, str],
    sidecars: Iterable[str] = (),
    **figures: Any,
) -> dict[str, Any]:
    """Write the manifest, which makes the directory an artefact, and then drop the progress of progress.

    Args:
        directory: of the shards.
        records: of all tars.
        settings: that shaped them.
        made_from: hashes of what they were made from.
        sidecars: files beside the tars and their index; what else lies there is no part of the shards.
        **figures: for the manifest.
    """
    figures |= {"shards": records, "samples": sum(record["samples"] for record in records)}
    files = dict.fromkeys([INDEX, *sidecars]) | {record["file"]: record["sha256"] for record in records}
    manifest = write_manifest(directory, "shards", settings=settings, made_from=made_from, files=files, **figures)
    drop_progress(directory)
    return manifest


def drop_progress(directory: Path) -> None:
    """Drop the progress of progress, which finished shards need no more."""
    shutil.rmtree(directory / _PROGRESS, ignore_errors=True)


@dataclass(frozen=True)
class _Progress:
    """What is finished: for each tar a note of its record and its rows of the index.

    The rows are noted, and not read back from the tar, so that going on costs no more than the tars' hashes.
    """

    directory: Path
    identity: str

    def write(self, shard: int, record: dict[str, Any], rows_S: Entries) -> None:
        write_json(self._path(shard), {"identity": self.identity, "record": record, "rows": rows_S.tobytes().hex()})

    def record(self, shard: int) -> dict[str, Any]:
        record: dict[str, Any] = read_json(self._path(shard))["record"]
        return record

    def rows(self, shard: int) -> Entries:
        return np.frombuffer(bytes.fromhex(read_json(self._path(shard))["rows"]), ENTRY)

    def holds(self, shard: int) -> bool:
        """Whether the shard is finished, and is what this run would make."""
        tar, path = self.directory / tar_name(shard), self._path(shard)
        if not tar.is_file() or not path.is_file():
            return False
        note = read_json(path)
        return bool(note["identity"] == self.identity and sha256_file(tar) == note["record"]["sha256"])

    def _path(self, shard: int) -> Path:
        return self.directory / _PROGRESS / f"{shard:06d}.json"


def _in_threads(work: Callable[[_Job], _Result], jobs: Iterable[_Job], threads: int) -> Iterator[_Result]:
    """The results as they come; the next job is made while at most `threads` are worked on."""
    under_way: set[Future[_Result]] = set()
    with ThreadPoolExecutor(threads) as pool:
        for job in jobs:
            if len(under_way) == threads:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            under_way.add(pool.submit(work, job))
        yield from (future.result() for future in under_way)


def _made(
    make: MakeSamples, shards: Iterable[tuple[bool, int]], total: int, per_shard: int
) -> Iterator[tuple[int, list[Sample]]]:
    """The samples of each shard; one that is another rank's is made as well, to stay in step, and dropped."""
    for mine, shard in shards:
        samples = list(make(range(total)[shard * per_shard : (shard + 1) * per_shard]))
        if mine:
            yield shard, samples


def _told(record: Mapping[str, Any]) -> str:
    return f"shard {record['file']}: {record['samples']} samples, {record['bytes'] / 1e6:.1f} MB"


def _drop_beyond(directory: Path, count: int) -> None:
    """Drop what a killed run left that is no part of this one: more tars than there will be, and what stood aside."""
    wanted = {tar_name(shard) for shard in range(count)}
    for path in directory.glob("*.tar"):
        if path.is_file() and is_tar_name(path.name) and path.name not in wanted:
            path.unlink()
    drop_stale(directory)
