"""Prepared datasets for tests: the synthetic log, and hand-written sequences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rarec.config import RunConfig
from rarec.config.schema import Prepare
from rarec.data.dataset import PreparedDataset
from rarec.data.tables import ROW_GROUP, Column
from rarec.stages.run import Run
from tests.synthetic import write_log


def prepared(root: Path, users: int = 60, items: int = 40, **more: Any) -> PreparedDataset:
    """Return the synthetic log, prepared."""
    interactions, catalogue = write_log(root / "log", users, items)
    config = Prepare.model_validate(
        {
            "interactions": {"path": str(interactions), "user": "user", "item": "item", "time": "time"},
            "items": {"path": str(catalogue), "item": "item", "title": "title"},
            **more,
        }
    )
    return prepare_dataset(config, root)


def run_of(config: Prepare, root: Path, *, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> Run:
    """Return a run in `root` that is used for its dataset only."""
    tree = {"run": {"dir": str(root), "seed": seed}, "prepare": config.model_dump(mode="json"), "llm": {"path": "-"}}
    return Run(RunConfig.model_validate(tree), say=say)


def prepare_dataset(config: Prepare, root: Path, **more: Any) -> PreparedDataset:
    """Build the dataset in `root/prepare` and return it; arguments as of `run_of`."""
    run = run_of(config, root, **more)
    run.make("prepare", fresh=True)
    return run.dataset


def identity_of(config: Prepare, seed: int = 0) -> list[Any]:
    """Return the identity of a dataset with this configuration: settings, and hashes of its inputs."""
    stage = run_of(config, Path("nowhere"), seed=seed).stage("prepare")
    return [stage.settings(), stage.outside_inputs()]


def column_of(values: Any) -> Column[Any]:
    """Return a column of values in memory, in chunks as in a file."""
    whole = values if isinstance(values, pa.Array) else pa.array(values)
    chunks = [whole.slice(start, ROW_GROUP) for start in range(0, len(whole), ROW_GROUP)]
    return Column(pa.chunked_array(chunks, whole.type))


def by_hand(sequences: list[list[int]], item_ids: pa.Array, user_ids: pa.Array) -> PreparedDataset:
    """Leave-one-out over these item rows: the last tests, the one before validates, the others train."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    return PreparedDataset(
        directory=Path("by hand"),
        manifest={},
        hash="by hand",
        user_ids=column_of(user_ids),
        item_ids=column_of(item_ids),
        titles=column_of([""] * len(item_ids)),
        texts=column_of([""] * len(item_ids)),
        train_counts_N=np.zeros(len(item_ids), dtype=np.int64),
        starts_U=(np.cumsum(lengths) - lengths).astype(np.int64),
        lengths_U=lengths,
        train_length_U=lengths - 2,
        validation_U=lengths - 2,
        test_U=lengths - 1,
        item_rows_I=np.concatenate(sequences).astype(np.int32),
    )
