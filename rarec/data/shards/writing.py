"""Write the shards, verify them, and write damaged ones anew.

Each tar is complete or absent, so that an interrupted stage resumes with the missing ones. Samples are computed shard
by shard in the thread of the model; worker threads pack, hash and flush earlier shards.

Shape letters: S samples.
"""

import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.data.dataset import PreparedDataset
from rarec.data.selection import Selection
from rarec.data.shards.files import INDEX, ShardDataset, open_index, tar_name, write_index
from rarec.data.shards.samples import INDEX_ROW, IndexRows, Sample, index_tar, sample_key, write_tar
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST, PROGRESS, check_files, read_sealed, write_sealed
from rarec.storage.files import read_json, remove_stale, sha256_file

MakeSamples = Callable[[range], Iterable[Sample]]
"""Compute the samples at a range of places, in order."""


def write_shards(
    directory: Path, places: Sequence[range], writers: int, make: MakeSamples, identity: str, world: World = SINGLE
) -> list[dict[str, Any]]:
    """Write samples as tars with an index; skip tars that an interrupted run with this identity completed.

    An error in `make` or in a writer ends the run after the tars in progress; they and all earlier ones are kept.

    Args:
        directory: directory of the shards.
        places: of the samples of each tar, without gaps.
        writers: number of tars written in parallel; at most one more is in memory.
        make: compute samples; called in this thread, one shard after the other.
        identity: hash of everything that determines the samples.
        world: processes that share the tars; the main process writes the index.

    Returns:
        The records of all shards, for the manifest.
    """
    shards = range(len(places))
    (directory / PROGRESS).mkdir(parents=True, exist_ok=True)
    world.run_on_main(lambda: remove_stale(directory))

    def write(shard: int, samples: list[Sample]) -> None:
        _note(directory, identity, shard, *write_tar(directory / tar_name(shard), samples, shard))

    # Rank 0 decides for all: another machine may not list yet what was written a moment ago.
    todo = world.run_on_all(
        lambda: [shard for shard in shards if world.is_main and not _is_complete(directory, identity, shard)]
    )
    missing = json.loads(world.exchange(json.dumps(todo))[0])
    world.report("writing shards")  # the title of the bar over the shards
    writing = deque[Future[None]]()
    with ThreadPoolExecutor(writers) as pool:
        for is_own, shard in world.split_in_lockstep(missing):
            world.report(f"computing {tar_name(shard)}")
            samples = list(make(places[shard]))
            if not is_own:  # computed to stay in step
                continue
            if len(writing) == writers:
                writing.popleft().result()
            writing.append(pool.submit(write, shard, samples))
        for future in writing:
            future.result()
    world.barrier()
    world.run_on_main(
        lambda: write_index(directory, (_noted(directory, shard)[1] for shard in shards), places[-1].stop)
    )
    return [_noted(directory, shard)[0] for shard in shards]


def _note(directory: Path, identity: str, shard: int, record: Mapping[str, Any], rows_S: IndexRows) -> None:
    """Note that a tar is complete, with its record and its rows: a resume then reads tars only to hash them."""
    note = {"identity": identity, "record": record, "rows": rows_S.tobytes().hex()}
    write_sealed(directory / PROGRESS / f"{shard:06d}.json", note)


def _noted(directory: Path, shard: int) -> tuple[dict[str, Any], IndexRows]:
    note = read_json(directory / PROGRESS / f"{shard:06d}.json")
    return note["record"], np.frombuffer(bytes.fromhex(note["rows"]), INDEX_ROW)


def _is_complete(directory: Path, identity: str, shard: int) -> bool:
    """Return True if a tar is complete and of this build."""
    try:
        note: dict[str, Any] = read_sealed(directory / PROGRESS / f"{shard:06d}.json", "")
        sha256 = sha256_file(directory / tar_name(shard))
        return note.get("identity") == identity and sha256 == note["record"]["sha256"]
    except (UserError, FileNotFoundError):  # missing or incomplete: the tar is written again
        return False


def keep_intact_tars(directory: Path, manifest: Mapping[str, Any], damaged: Collection[str]) -> None:
    """Note all tars but the damaged ones as completed: `write_shards` then writes those and the index anew.

    Its `identity` is the manifest's hash.

    Args:
        directory: directory of the shards.
        manifest: manifest before the repair.
        damaged: names of damaged files.
    """
    (directory / PROGRESS).mkdir(exist_ok=True)
    index_S = None if INDEX in damaged else open_index(directory, manifest)
    start = 0
    for shard, record in enumerate(manifest["shards"]):
        end = start + record["samples"]
        if record["file"] not in damaged:
            rows_S = index_tar(directory / record["file"], shard) if index_S is None else index_S[start:end]
            _note(directory, manifest["hash"], shard, record, rows_S)
        start = end


def describe_shards(
    records: list[dict[str, Any]], sidecars: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Return what the manifest says of the shards: its fields about the tars, and its `files`.

    Args:
        records: records of all tars.
        sidecars: files besides the tars and their index; other files in the directory are not part of the shards.
    """
    figures = {"shards": records, "samples": sum(record["samples"] for record in records)}
    return figures, dict.fromkeys([INDEX, *sidecars]) | {record["file"]: record["sha256"] for record in records}


def damaged_files(directory: Path, manifest: Mapping[str, Any], threads: int) -> dict[str, str]:
    """Return a line for each file that differs from the manifest, is missing, or is not in it.

    Args:
        directory: directory of the shards.
        manifest: its manifest.
        threads: number of files read in parallel.
    """
    files: dict[str, str] = manifest["files"]
    with ThreadPoolExecutor(threads) as pool:
        lines = pool.map(lambda name: _file_problem(directory, manifest, name), files)
        problems = {name: line for name, line in zip(files, lines, strict=True) if line}
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    problems |= {name: f"{name} is not one of these shards' files" for name in names - {*files, MANIFEST}}
    return dict(sorted(problems.items()))


def _file_problem(directory: Path, manifest: Mapping[str, Any], name: str) -> str:
    try:
        check_files(directory, manifest, names=[name])
    except UserError as error:
        return error.problem
    except OSError as error:
        return f"{directory / name} cannot be read: {error.strerror}"
    return ""


def wrong_samples(
    samples: ShardDataset, dataset: PreparedDataset, selection: Selection, item_states_NLD: npt.NDArray[np.floating]
) -> dict[str, str]:
    """Read every sample as training does; return a line for each tar with a wrong one, although all hashes are right.

    Args:
        samples: the samples by number.
        dataset: prepared dataset.
        selection: the samples that were selected.
        item_states_NLD: text-only states of the catalogue.
    """
    if len(samples) != len(selection.user_rows):
        return {INDEX: f"{INDEX} has {len(samples)} samples, but {len(selection.user_rows)} were selected"}
    problems: dict[str, str] = {}
    selected = zip(selection.user_rows.tolist(), selection.positions.tolist(), strict=True)
    for number, (user, position) in enumerate(selected):
        file = tar_name(int(samples.index_S[number]["shard"]))
        if file in problems:
            continue
        try:
            problem = _mismatch(samples[number], dataset, user, position, item_states_NLD[0])
        except UserError as error:
            problem = error.problem
        if problem:
            problems[file] = f"shard {file}, sample {sample_key(user, position)}: {problem}"
    return problems


def _mismatch(
    sample: Sample, dataset: PreparedDataset, user: int, position: int, like_LD: npt.NDArray[np.floating]
) -> str | None:
    """Return the first difference between a sample and the dataset, or None."""
    if (sample.user, sample.position) != (user, position):
        return f"in its place is sample {sample.key}"
    if not np.array_equal(sample.history_H, dataset.history(user, position)):
        return "field history.npy is not the user's history"
    if sample.target != dataset.sequence(user)[position]:
        return "field json: the target is not the user's item at that position"
    states_LD = sample.states_LD
    if (states_LD.dtype, states_LD.shape) != (like_LD.dtype, like_LD.shape):
        return f"field states.npy is {states_LD.dtype} of {states_LD.shape}, not {like_LD.dtype} of {like_LD.shape}"
    if not all(np.isfinite(values).all() for values in (states_LD, *sample.vectors.values())):
        return "a state or a vector has NaN or infinity"
    return None
