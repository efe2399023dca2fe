"""`data stream`: compare the stream with a bare `tarfile` read and a frozen model; measure memory and restart.

Speed is measured on shards that all differ. For memory and restart only the number of shards matters, so many shards
are hard links to one tar, with the index and manifest of as many full shards.
"""

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rarec.config.schema import Shards, Train
from rarec.data.shards.batch_plan import BatchPlan
from rarec.data.shards.files import INDEX, ShardDataset, Tars, open_index, tar_name, write_index
from rarec.data.shards.samples import Sample
from rarec.data.shards.writing import describe_shards, write_shards
from rarec.storage.artefacts import check_files, read_manifest, write_manifest
from tools.bench.measuring import Figure, apart, at_least, at_most, memory, seconds

BLOCKS, HIDDEN, DIM, ITEMS = 7, 384, 64, 12_000
BATCH, BUDGET = 64, 64 * 80
"""Samples, or padded tokens, of a step."""
MANY = 1_000
"""Number of shards for the restart."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the sub-command."""
    parser.add_argument(
        "--shards", type=int, default=20, help="number of different shards, each of --samples, 10 kB per sample"
    )
    parser.add_argument("--samples", type=int, default=1024, help="samples per shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="scratch directory; the default is the one for temporary files")


def run(arguments: argparse.Namespace) -> list[Figure]:
    """Create the shards, measure, and delete them."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        shards, samples = arguments.shards, arguments.samples
        places = {count: Path(scratch) / str(count) for count in (shards, 10 * shards, MANY)}
        write_different(places[shards], shards, samples)
        for count in {*places} - {shards}:
            write_same(places[count], places[shards], count)
        figures = [
            at_most(f"restart in mid-epoch at {MANY} shards, {by}", worst, 2, " s")
            for by, worst in restarts(places[MANY], arguments.rounds)
        ]
        resident = [apart(resident_over_an_epoch, places[count]) for count in (shards, 10 * shards)]
        figures += [
            Figure("memory before an epoch", f"{resident[0][0]:.0f} MiB"),
            at_most(
                f"resident memory over an epoch of {shards} shards, maximum - minimum",
                resident[0][2] - resident[0][1],
                20,
                " MiB",
            ),
            at_most(f"same with {10 * shards} shards", resident[1][2] - resident[1][1], 20, " MiB"),
            at_most("maximum with ten times the shards - maximum", resident[1][2] - resident[0][2], 20, " MiB"),
        ]
        figures += apart(speeds, places[shards], arguments.rounds)
    return figures


def made_samples(places: range) -> Iterator[Sample]:
    """Yield random samples of realistic sizes, all different."""
    for number in places:
        rng = np.random.default_rng(number)
        history = rng.integers(ITEMS, size=rng.integers(8, 51)).astype(np.int32)
        tokens = rng.integers(30_000, size=rng.integers(40, 101)).astype(np.int32)
        states = rng.standard_normal((BLOCKS, HIDDEN), dtype=np.float32).astype(np.float16)
        vectors = {"id": rng.standard_normal((1, DIM), dtype=np.float32)}
        yield Sample(number, len(history), int(rng.integers(ITEMS)), history, tokens, {"id": 0}, states, vectors)


def write_different(directory: Path, shards: int, samples: int) -> None:
    """Write shards as `rarec shards` does."""
    records = write_shards(directory, shards * samples, Shards(samples_per_shard=samples), made_samples, "bench")
    finish(directory, records)


def write_same(directory: Path, source: Path, shards: int) -> None:
    """Link the first shard of `source` under many names."""
    directory.mkdir()
    manifest = read_manifest(source, "shards")
    first = manifest["shards"][0]
    rows_S = np.array(open_index(source, manifest)[: first["samples"]])
    for shard in range(shards):
        os.link(source / first["file"], directory / tar_name(shard))
    numbered = (with_shard(rows_S, shard) for shard in range(shards))
    write_index(directory, numbered, shards * len(rows_S))
    records = [{**first, "file": tar_name(shard)} for shard in range(shards)]
    finish(directory, records)


def finish(directory: Path, records: list[dict[str, Any]]) -> None:
    """Write the manifest."""
    figures, files = describe_shards(records, ())
    write_manifest(directory, "shards", settings={}, made_from={}, files=files, **figures)


def with_shard(rows_S: np.ndarray, shard: int) -> np.ndarray:
    """Assign index rows to another shard."""
    rows_S["shard"] = shard
    return rows_S


def stream_of(directory: Path, by: str) -> tuple[BatchPlan, ShardDataset]:
    """Open plan and samples as training does, with batches by size or by tokens."""
    manifest = read_manifest(directory, "shards")
    check_files(directory, {**manifest, "files": {INDEX: manifest["files"][INDEX]}})
    index_S = open_index(directory, manifest)
    shards, tokens = index_S["shard"], index_S["tokens"]
    by_size = by == "batch_size"
    plan = (
        BatchPlan(shards, tokens, 0, Train(batch_size=BATCH))
        if by_size
        else BatchPlan(shards, tokens, 0, Train(tokens_per_batch=BUDGET))
    )
    return plan, ShardDataset(index_S, Tars(directory))


def restarts(directory: Path, rounds: int) -> Iterator[tuple[str, float]]:
    """Yield, for both kinds of batches, the slowest restart in fresh processes."""
    for by in ("batch_size", "tokens_per_batch"):
        yield by, max(apart(restart, directory, by) for _ in range(rounds))


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


def speeds(directory: Path, rounds: int) -> list[Figure]:
    """Measure whole epochs and whole bare reads in turns, then the speed of a frozen model."""
    plan, stored = stream_of(directory, "batch_size")
    samples, rarec, bare = plan.samples, [], []
    for epoch in range(rounds + 1):
        bare.append(samples / seconds(partial(read_bare, directory)))
        rarec.append(samples / seconds(partial(read_epoch, plan, stored, epoch)))
    ratio = statistics.median(a / b for a, b in zip(rarec[1:], bare[1:], strict=True))  # the first round warms up
    consumed = step_rate()
    return [
        Figure("bare tarfile read, decoded", f"{statistics.median(bare[1:]):,.0f} samples/s"),
        Figure("stream, checked and in random order", f"{statistics.median(rarec[1:]):,.0f} samples/s"),
        at_least("stream / bare", ratio, 0.9),
        Figure("a frozen model of 110M parameters, forward and backward", f"{consumed:,.2f} samples/s"),
        at_least("stream / frozen model", statistics.median(rarec[1:]) / consumed, 20),
    ]


def read_epoch(plan: BatchPlan, samples: ShardDataset, epoch: int, ranks: int = 1) -> None:
    """Read the last rank's part of an epoch and keep nothing."""
    for numbers in plan.batches(epoch):
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


def step_rate(batch: int = 16, length: int = 70, steps: int = 3) -> float:
    """Return samples per second of a frozen BERT base with random weights, forward and backward to its inputs."""
    import torch  # imported here: not in the processes that measure memory
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig()).requires_grad_(False)
    inputs = torch.randn(batch, length, model.config.hidden_size, requires_grad=True)
    spent = [seconds(lambda: model(inputs_embeds=inputs).last_hidden_state.sum().backward()) for _ in range(steps + 1)]
    return batch / statistics.median(spent[1:])
