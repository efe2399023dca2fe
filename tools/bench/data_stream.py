"""Compare the stream with a bare `tarfile` read; measure memory and restart.

Speed and memory are measured on --shards shards that all differ, each of --samples, 10 kB per sample. For a restart
only the number of shards matters, so many shards are hard links to one tar, with the index and manifest of as many full
shards. --directory is for scratch files. Memory of ten times the shards: part `growth` of `python -m tools.bench`.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rarec.config.schema import Shards, Train
from rarec.data.shards.batch_plan import ShardPlan
from rarec.data.shards.files import INDEX, ShardDataset, Tars, open_index, tar_name, write_index
from rarec.data.shards.samples import Sample
from rarec.data.shards.writing import describe_shards, write_shards
from rarec.storage.artefacts import check_files, read_manifest, write_manifest
from tools.bench.measuring import Figure, Row, apart, at_most, in_turns, memory

OPTIONS = {"shards": 20, "samples": 1024, "rounds": 3, "directory": str}
BLOCKS, HIDDEN, DIM, ITEMS = 7, 384, 64, 12_000
SIZES = {"batch_size": 64, "tokens_per_batch": 64 * 80}
"""Samples, or padded tokens, of a step."""
MANY = 1_000
"""Number of shards for the restart."""


def run(arguments: argparse.Namespace) -> list[Figure]:
    """Create the shards, measure, and delete them."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        few, many, shards = Path(scratch) / "few", Path(scratch) / "many", arguments.shards
        write_different(few, shards, arguments.samples)
        write_same(many, few, MANY)
        figures = []
        for by in SIZES:
            slowest = max(apart(restart, many, by) for _ in range(arguments.rounds))
            figures.append(at_most(f"restart in mid-epoch at {MANY} shards, {by}", slowest, 2, " s"))
        before, low, high = apart(resident_over_an_epoch, few)
        what = f"resident memory over an epoch of {shards} shards, maximum - minimum"
        return [
            *figures,
            Figure("memory before an epoch", f"{before:.0f} MiB"),
            at_most(what, high - low, 20, " MiB"),
            apart(speed, few, arguments.rounds).figure(),
        ]


def row(directory: Path, shards: int) -> Row:
    """Compare the speed of the stream with that of a bare read, over shards that are made for it."""
    write_different(directory, shards, 1024)
    return speed(directory, 3)


def speed(directory: Path, rounds: int) -> Row:
    """Read whole epochs of the stream, and every tar without checks, in turns."""
    plan, samples = stream_of(directory, "batch_size")
    readers = {"stream": partial(read_epoch, plan, samples), "bare": partial(read_bare, directory)}
    spent = in_turns(rounds, readers)
    ours, bare = (len(samples) / float(np.median(spent[way])) for way in readers)
    return Row.least("stream / bare tar and decode", ours, bare, 0.9, "samples/s")


def made_samples(numbers: range) -> Iterator[Sample]:
    """Yield random samples of realistic sizes, all different."""
    for number in numbers:
        rng = np.random.default_rng(number)
        history = rng.integers(ITEMS, size=rng.integers(8, 51)).astype(np.int32)
        tokens = rng.integers(30_000, size=rng.integers(40, 101)).astype(np.int32)
        states = rng.standard_normal((BLOCKS, HIDDEN), dtype=np.float32).astype(np.float16)
        vectors = {"id": rng.standard_normal((1, DIM), dtype=np.float32)}
        yield Sample(number, len(history), int(rng.integers(ITEMS)), history, tokens, {"id": 0}, states, vectors)


def write_different(directory: Path, shards: int, samples: int) -> None:
    """Write shards as `rarec shards` does."""
    places = [range(shard * samples, (shard + 1) * samples) for shard in range(shards)]
    finish(directory, write_shards(directory, places, Shards().writers, made_samples, "bench"))


def write_same(directory: Path, source: Path, shards: int) -> None:
    """Link the first shard of `source` under many names."""
    directory.mkdir()
    manifest = read_manifest(source, "shards")
    first = manifest["shards"][0]
    rows_S = np.array(open_index(source, manifest)[: first["samples"]])

    def numbered() -> Iterator[np.ndarray]:
        for shard in range(shards):
            rows_S["shard"] = shard
            yield rows_S

    for shard in range(shards):
        os.link(source / first["file"], directory / tar_name(shard))
    write_index(directory, numbered(), shards * len(rows_S))
    finish(directory, [{**first, "file": tar_name(shard)} for shard in range(shards)])


def finish(directory: Path, records: list[dict[str, Any]]) -> None:
    """Write the manifest."""
    figures, files = describe_shards(records, ())
    write_manifest(directory, "shards", settings={}, made_from={}, files=files, **figures)


def stream_of(directory: Path, by: str) -> tuple[ShardPlan, ShardDataset]:
    """Open plan and samples as training does, with batches by size or by tokens."""
    manifest = read_manifest(directory, "shards")
    check_files(directory, {**manifest, "files": {INDEX: manifest["files"][INDEX]}})
    index_S = open_index(directory, manifest)
    train = Train.model_validate({by: SIZES[by]})
    return ShardPlan(index_S["shard"], index_S["tokens"], 0, train), ShardDataset(index_S, Tars(directory))


def restart(directory: Path, by: str) -> float:
    """Return the seconds from opening the shards to the batch in the middle of an epoch."""
    started = time.perf_counter()
    plan, samples = stream_of(directory, by)
    samples.read(next(plan.batches(1, plan.steps(1) // 2)))
    return time.perf_counter() - started


def resident_over_an_epoch(directory: Path) -> tuple[float, float, float]:
    """Return resident MiB before an epoch, and the minimum and maximum during it, after its first tenth."""
    before, seen = memory("VmRSS"), []
    plan, samples = stream_of(directory, "batch_size")
    for step, numbers in enumerate(plan.batches(0)):
        samples.read(numbers)
        if step >= plan.steps(0) // 10:
            seen.append(memory("VmRSS"))
    return before, min(seen), max(seen)


def read_epoch(plan: ShardPlan, samples: ShardDataset, ranks: int = 1) -> None:
    """Read the last rank's part of an epoch and keep nothing."""
    for numbers in plan.batches(0):
        samples.read(plan.share(numbers, ranks - 1, ranks))


def read_bare(directory: Path) -> None:
    """Decode every member of every tar without checks."""
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                if member.name.endswith(".json"):
                    json.loads(data)
                else:
                    np.load(io.BytesIO(data), allow_pickle=False)
