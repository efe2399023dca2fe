"""Prepared datasets for tests: the synthetic log, and hand-written sequences."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rarec.config.logs import Prepare
from rarec.data.dataset import PreparedDataset
from rarec.data.preparation.pipeline import prepare_dataset
from tests.synthetic import write_log


def prepared(root: Path, users: int = 60, items: int = 40, **more: Any) -> PreparedDataset:
    """The synthetic log, prepared."""
    interactions, catalogue = write_log(root / "log", users, items)
    config = Prepare.model_validate(
        {
            "interactions": {"path": str(interactions), "user": "user", "item": "item", "time": "time"},
            "items": {"path": str(catalogue), "item": "item", "title": "title"},
            **more,
        }
    )
    return prepare_dataset(config, root / "prepare", seed=0, say=lambda line: None)


def by_hand(sequences: list[list[int]], item_ids: pa.Array, user_ids: pa.Array) -> PreparedDataset:
    """Leave-one-out over these item rows: the last tests, the one before validates, the others train."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    return PreparedDataset(
        directory=Path("by hand"),
        manifest={},
        hash="by hand",
        user_ids=user_ids,
        item_ids=item_ids,
        titles=[""] * len(item_ids),
        texts=[""] * len(item_ids),
        train_counts_N=np.zeros(len(item_ids), dtype=np.int64),
        starts_U=(np.cumsum(lengths) - lengths).astype(np.int64),
        lengths_U=lengths,
        train_length_U=lengths - 2,
        validation_U=lengths - 2,
        test_U=lengths - 1,
        item_rows_I=np.concatenate(sequences).astype(np.int32),
    )
