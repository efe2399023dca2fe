"""Measure time and memory of opening a large dataset, of selecting samples, and with --stages of every stage over it.

DIR is replaced. The dataset is written as if it had been prepared; the language model is a tiny one with random
weights. Memory is a process's own, without the pages of mapped files, which the system takes back when it needs them.
--memory is run.memory_gb, the bound of a table in memory; --most is the goal for a stage's own memory, in GB.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rarec.config import RunConfig
from rarec.data import tables
from rarec.data.selection import select_samples
from rarec.stages.run import Run
from rarec.storage.artefacts import write_manifest
from rarec.storage.directories import new_directory
from tools.bench.measuring import GB, Figure, apart, at_most, memory, sampled_memory, seconds

OPTIONS = {
    **{"directory": Path, "interactions": 100_000_000, "users": 10_000_000, "items": 10_000_000},
    **{"memory": 1.0, "most": 2.0, "stages": False},
}
ROWS = 1 << 20
"""Rows generated at a time."""
DIM = 16
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
WORDS = ("amber", "birch", "cedar", "coral", "ember", "flint", "heather", "indigo", "jade", "linen", "maple", "ochre")
STAGES = ("ids", "neighbours", "shards", "train", "evaluate", "export")


def run(arguments: argparse.Namespace) -> list[Figure]:
    """Measure each step in a process of its own; it takes long, so each figure is printed as it comes."""
    figures = []
    for figure in measure(arguments):
        print(f"{figure.what}: {figure.figure}", file=sys.stderr, flush=True)
        figures.append(figure)
    return figures


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Write the dataset, and yield the figures."""
    shutil.rmtree(arguments.directory, ignore_errors=True)
    sizes = (arguments.interactions, arguments.users, arguments.items)
    config = make_config(arguments.directory, arguments.memory)
    apart(write_dataset, config, *sizes)
    apart(measured, open_dataset, config)  # the first time, every file is read and compared with its hash
    spent, resident, _ = apart(measured, open_dataset, config)
    yield Figure("dataset", "{:,} interactions, {:,} users, {:,} items".format(*sizes))
    yield at_most("opening it", spent, 2, " s")
    yield at_most("opening it: resident memory", resident * GB * 1000, 300, " MB")
    one_in_a_thousand = {"all": {}, "denoise, diversify": {"denoise": True, "diversify": True}}
    steps: dict[str, tuple[Any, ...]] = {
        f"selecting one sample in a thousand ({name})": (select, config, choice)
        for name, choice in one_in_a_thousand.items()
    }
    if arguments.stages:
        steps |= {f"stage {stage}": (make_stage, config, stage) for stage in STAGES}
    for what, step in steps.items():
        spent, _, own = apart(measured, *step)
        yield Figure(what, f"{spent:,.1f} s")
        yield at_most(f"{what}: own memory", own * GB, arguments.most, " GB")


def make_config(directory: Path, memory_gb: float) -> dict[str, Any]:
    """Return the configuration of the run."""
    vectors = {"items": str(directory / "vectors.npy"), "item_ids": str(directory / "vector_ids.npy")}
    few = {"max_steps": 4, "validation_users": 100, "batch_size": 32, "trackers": [], "variants": ["per_layer"]}
    return {
        "run": {"dir": str(directory / "run"), "memory_gb": memory_gb, "device": "cpu"},
        "prepare": {
            "interactions": {"path": "log.parquet", "user": "user", "item": "item", "position": "position"},
            "items": {"path": "items.parquet", "item": "item", "title": "title"},
            "memory": "1GB",
        },
        "ids": {"model": "import", "imported": vectors},
        "neighbours": {"models": ["cooccurrence", "transition"]},  # words and EASE are for catalogues of thousands
        "llm": {"path": str(directory / "llm")},
        "prompt": {"max_history": 5},
        "shards": {"share": 2e-4},
        "train": few,
        "evaluate": {"users": 100, "resamples": 10, "sanity_checks": False},
        "export": {"variant": "per_layer+id+cheap"},
    }


def open_run(config: dict[str, Any]) -> Run:
    """Return the run."""
    return Run(RunConfig.model_validate(config), say=lambda line: None)


def write_dataset(config: dict[str, Any], interactions: int, users: int, items: int) -> None:
    """Write the dataset, the vectors to import and the language model."""
    from tools.bench.small_runs import write_llama  # not above: no other process that measures loads torch by it

    stage, rng = open_run(config).stage("prepare"), np.random.default_rng(0)
    lengths_U = np.full(users, interactions // users, np.int32)
    lengths_U[: interactions - int(lengths_U.sum())] += 1
    counts_N = np.zeros(items, np.int64)
    with new_directory(stage.directory) as temporary:
        rows = interaction_batches(lengths_U, counts_N, rng)
        tables.write_rows(rows, temporary / tables.INTERACTIONS, tables.interactions_schema("position"))
        tables.write_rows(user_batches(lengths_U), temporary / tables.USERS, tables.users_schema(pa.int64()))
        tables.write_rows(item_batches(counts_N), temporary / tables.ITEMS, tables.items_schema(pa.int64()))
        tables.write_columns(temporary)
        write_manifest(temporary, "prepare", settings=stage.settings(), made_from={}, counts={})
    imported = config["ids"]["imported"]
    np.save(imported["item_ids"], np.arange(items))
    table = np.lib.format.open_memmap(imported["items"], mode="w+", dtype=np.float32, shape=(items, DIM))
    for part in parts(items):
        table[part] = rng.standard_normal((part.stop - part.start, DIM), dtype=np.float32)
    write_llama(Path(config["llm"]["path"]), [*WORDS, "no .", *map(str, range(1000))], **SMALL)


def parts(total: int) -> Iterator[slice]:
    """Yield slices of rows."""
    for start in range(0, total, ROWS):
        yield slice(start, min(start + ROWS, total))


def interaction_batches(
    lengths_U: npt.NDArray[np.int32], counts_N: npt.NDArray[np.int64], rng: np.random.Generator
) -> Iterator[pa.RecordBatch]:
    """Yield interactions of random items, few of them often; count those of the training."""
    step = max(ROWS // int(lengths_U.max()), 1)
    for start in range(0, len(lengths_U), step):
        lengths_u = lengths_U[start : start + step]
        users_i = np.repeat(np.arange(start, start + len(lengths_u)), lengths_u)
        positions_i = np.arange(len(users_i)) - np.repeat(np.cumsum(lengths_u) - lengths_u, lengths_u)
        items_i = (len(counts_N) * rng.random(len(users_i)) ** 3).astype(np.int64)
        trains_i = positions_i < np.repeat(lengths_u, lengths_u) - 2
        np.add.at(counts_N, items_i[trains_i], 1)
        columns = {"user_row": users_i, "item_row": items_i, "position": positions_i.astype(np.float64)}
        yield pa.RecordBatch.from_pydict(columns)


def user_batches(lengths_U: npt.NDArray[np.int32]) -> Iterator[pa.RecordBatch]:
    """Yield users whose last interaction tests and whose last but one validates."""
    starts_U = np.cumsum(lengths_U, dtype=np.int64) - lengths_U
    for part in parts(len(lengths_U)):
        rows, length = np.arange(part.start, part.stop), lengths_U[part]
        ends = {"train_length": length - 2, "validation": length - 2, "test": length - 1, "cold": length < 4}
        yield pa.RecordBatch.from_pydict(
            {"row": rows, "user_id": rows, "start": starts_U[part], "length": length, **ends}
        )


def item_batches(counts_N: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    """Yield items with titles of words."""
    for part in parts(len(counts_N)):
        rows, counts = np.arange(part.start, part.stop), counts_N[part]
        titles = [f"{WORDS[row % 12]} {WORDS[row // 12 % 12]} no. {row % 1000}" for row in rows]
        columns = {"row": rows, "item_id": rows, "title": titles, "text": [""] * len(rows)}
        yield pa.RecordBatch.from_pydict({**columns, "train_count": counts, "cold": counts == 0})


def open_dataset(config: dict[str, Any]) -> None:
    """Open the dataset, and read a title and a history."""
    dataset = open_run(config).dataset
    assert dataset.titles[dataset.n_items - 1]
    assert len(dataset.sequence(dataset.n_users // 2))


def select(config: dict[str, Any], choice: dict[str, Any]) -> None:
    """Select one sample in a thousand."""
    run = open_run({**config, "shards": {"share": 1e-3, **choice}})
    assert len(select_samples(run.dataset, run.config.shards, 0).user_rows)


def make_stage(config: dict[str, Any], stage: str) -> None:
    """Run one stage."""
    open_run(config).run([stage])


def measured(action: Callable[..., None], *arguments: Any) -> tuple[float, float, float]:
    """Return the seconds of a call, the MiB by which it raises resident memory, and its peak of anonymous memory."""
    resident = memory("VmRSS")
    with sampled_memory() as own:
        spent = seconds(partial(action, *arguments))
    return spent, memory("VmRSS") - resident, max(own) - own[0]
