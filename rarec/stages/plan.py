"""`rarec plan`: what a training will take, before anything is loaded."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors import safe_open

from rarec.artefacts import MANIFEST, check_settings, read_manifest
from rarec.config.ids import Ids, Import, Recipe
from rarec.data.shards.index import open_index
from rarec.errors import UserError
from rarec.ids.imports import existing
from rarec.models.build import SourceShape
from rarec.planning.advice import advise
from rarec.planning.blueprint import Blueprint
from rarec.planning.calculator import Calculator
from rarec.planning.memory import STAGES, Stage
from rarec.planning.samples import Batches, Samples
from rarec.planning.setting import Cluster
from rarec.planning.table import Plan
from rarec.stages.run import Run
from rarec.training.feed import batch_plan


def plan(run: Run, cluster: Cluster, asked: Stage | None) -> Plan:
    """Plan every variant of a run; the largest decides on engine and changes.

    Args:
        run: the run; nothing of it is loaded, and nothing is written.
        cluster: where it is to train.
        asked: the engine; None for the one that is advised.

    Raises:
        UserError: the language model's configuration or a file of vectors is missing, or the batch is too small.
    """
    config = run.config
    sources = {name: _shape(section) for name, section in config.sources_by_name.items()}
    calculator = Calculator(config, Blueprint(config, sources, run.converted_llm), _samples(run, sources))
    variants = list(dict.fromkeys(config.train.variants))
    first = calculator.setting(cluster, asked or "0")
    largest = max(variants, key=lambda variant: calculator.account(variant, first).total)
    advice = advise(calculator, largest, cluster, asked)
    engines = [replace(advice.setting, stage=stage) for stage in STAGES]
    accounts = {each.stage: calculator.account(largest, each) for each in engines if calculator.possible(each)}
    return Plan(
        calculator,
        {variant: calculator.estimate(variant, advice.setting) for variant in variants},
        largest,
        accounts,
        advice,
    )


def _samples(run: Run, sources: Mapping[str, SourceShape]) -> Samples | None:
    """Those of the run's shards, if they are there and as the configuration has them now."""
    directory, config = run.directory("shards"), run.config
    if not (directory / MANIFEST).exists():
        return None
    manifest = read_manifest(directory, "shards")
    try:
        check_settings(directory, manifest, run.stage("shards").settings())
    except UserError:
        run.say(f"{directory} was made with other settings: the number of samples is not known")
        return None
    index_S = open_index(directory, manifest)
    tokens_S = index_S["tokens"]
    if not config.train.tokens_per_batch:
        return Samples.of(tokens_S)
    epoch = batch_plan(config, sources, index_S).batches(0)
    return Samples.of(tokens_S, Batches.of(tokens_S[numbers] for numbers in epoch))


def _shape(section: Ids | Import) -> SourceShape:
    """Of the vectors that are trained, or that lie in a file: its header is read, no more."""
    chosen = section.chosen if isinstance(section, Ids) else section
    if isinstance(chosen, Recipe):
        return SourceShape(chosen.dim, chosen.per_user)
    users = _file_shape(chosen.users, "users") if chosen.users is not None else ()
    return SourceShape(_file_shape(chosen.items, "items")[-1], users[1] if len(users) == 3 else 1)


def _file_shape(path: str, field: str) -> tuple[int, ...]:
    """Shape of a file of vectors."""
    file = existing(path, field)
    readers = {".npy": _npy_shape, ".safetensors": _safetensors_shape, ".parquet": _parquet_shape}
    if file.suffix not in readers:
        raise UserError(f"field `{field}`: {path} is of no known format", f"give one of {', '.join(readers)}")
    try:
        shape = readers[file.suffix](file)
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error}", "make it as README says, under *Your own data*") from None
    if len(shape) < 2:
        raise UserError(f"{path} has shape {shape}", "vectors have two axes: rows, dimension")
    return shape


def _npy_shape(file: Path) -> tuple[int, ...]:
    return tuple(np.load(file, mmap_mode="r", allow_pickle=False).shape)


def _safetensors_shape(file: Path) -> tuple[int, ...]:
    with safe_open(file, "np") as tensors:
        return tuple(tensors.get_slice(next(iter(tensors.keys()))).get_shape())


def _parquet_shape(file: Path) -> tuple[int, ...]:
    table: Any = pq.ParquetFile(file)
    first = next(table.iter_batches(batch_size=1, columns=["vector"]))
    return table.metadata.num_rows, len(first.column(0)[0].as_py())
