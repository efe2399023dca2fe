"""Write shards of synthetic samples, and open streams over them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rarec.data.shards.batch_plan import BatchPlan
from rarec.data.shards.index import open_index, tar_name, write_index
from rarec.data.shards.samples import Sample, write_shard
from rarec.data.shards.stream import SampleStream
from rarec.data.shards.tars import LocalTars, Tars
from rarec.data.shards.writing import finish_shards

ITEMS = 13


def made_sample(number: int, **other: Any) -> Sample:
    """The same for the same number."""
    history = np.arange(number % 5 + 1, dtype=np.int32)
    fields = {
        "user": number,
        "position": len(history),
        "target": number % ITEMS,
        "history_H": history,
        "tokens_T": np.arange(7 + number * 7 % 11, dtype=np.int32),
        "marks": {"id": 1},
        "states_LD": np.full((2, 4), number, np.float16),
        "vectors": {"id": np.full((1, 3), number, np.float32)},
    }
    return Sample(**fields | other)


def write_shards(directory: Path, sizes: Iterable[int], sidecars: dict[str, bytes] | None = None) -> dict[str, Any]:
    """Shards of these sizes, numbered on; returns their manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    records, rows, total = [], [], 0
    for shard, size in enumerate(sizes):
        record, own = write_shard(directory / tar_name(shard), map(made_sample, range(total, total + size)), shard)
        records.append(record)
        rows.append(own)
        total += size
    write_index(directory, rows, total)
    for name, content in (sidecars or {}).items():
        (directory / name).write_bytes(content)
    return finish_shards(directory, records, {}, {}, sidecars or ())


def open_stream(directory: Path, manifest: dict[str, Any], tars: Tars | None = None, **plan: Any) -> SampleStream:
    """A stream over shards on disk."""
    index_S = open_index(directory, manifest)
    made = BatchPlan(index_S["shard"], index_S["tokens"], plan.pop("seed", 3), **{"batch_size": 8} | plan)
    return SampleStream(made, index_S, tars or LocalTars(directory), ITEMS)


def users(batches: Iterable[Iterable[Sample]]) -> list[list[int]]:
    """The samples' numbers, batch by batch."""
    return [[sample.user for sample in batch] for batch in batches]
