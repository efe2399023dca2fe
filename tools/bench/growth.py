"""Part `growth` of bench.py: ten times as much of something takes at most ten times as long, and memory stays.

| row | what grows |
| --- | --- |
| samples | an epoch of the stream, over ten times as many shards, by one process and by one of two; and the memory |
| items | ranking for the same users |
| history | an epoch of an ID model's windows, over histories ten times as long |
| 10 million items | ranked for 64 users: this process's own memory, beside 4 GB |
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rarec.data.dataset import PreparedDataset
from rarec.data.tables import Column
from rarec.ids.objective import Windows
from rarec.ranking.rank import VectorScores, rank_scores
from tools.bench.data_stream import read_epoch, resident_over_an_epoch, stream_of, write_different, write_same
from tools.bench.measuring import Row, apart, memory, seconds

TEN, ALLOWED = 10, 10.5
Action = Callable[[], object]


def rows(quick: bool) -> list[Row]:
    """Measure each."""
    rounds = 2 if quick else 5
    items = 1_000_000 if quick else 10_000_000
    return [
        *samples(2 if quick else 10, rounds),
        grown("items: ten times as many, ranking for 512 users", ranked, 20_000, rounds),
        grown("history: ten times as long, windows of an ID model", windows, 50, rounds),
        Row.most(f"{items:,} items of 64 ranked / 4 GB", apart(own_memory, items), 4 * items / 10_000_000, 1, "GB"),
    ]


def samples(shards: int, rounds: int) -> list[Row]:
    """Read an epoch of few shards and of ten times as many."""
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch) / "few", Path(scratch) / "many"
        write_different(few, shards, 1024)
        write_same(many, few, TEN * shards)
        streams = [stream_of(place, "batch_size") for place in (few, many)]
        found = {}
        for ranks, what in ((1, "an epoch of the stream"), (2, "one of two ranks' part of an epoch")):
            spent = [
                [seconds(partial(read_epoch, *stream, epoch, ranks)) for stream in streams] for epoch in range(rounds)
            ]
            found[what] = [statistics.median(times) for times in zip(*spent, strict=True)]
        held = [apart(resident_over_an_epoch, place)[2] for place in (few, many)]
    return [
        *(
            Row.most(f"samples: ten times as many, {what}", many, few, ALLOWED, "s")
            for what, (few, many) in found.items()
        ),
        Row.most("samples: ten times as many, memory", held[1], held[0], 1.1, "MiB"),
    ]


def grown(name: str, action: Callable[[int], Action], size: int, rounds: int) -> Row:
    """Time an action of a size, and of ten times that, in turns."""
    prepared = [action(count) for count in (size, TEN * size)]
    spent = [[seconds(run) for run in prepared] for _ in range(rounds + 1)][1:]
    little, much = (statistics.median(times) for times in zip(*spent, strict=True))
    return Row.most(name, much, little, ALLOWED, "s")


def ranked(items: int) -> "partial[npt.NDArray[np.int64]]":
    """Return a ranking of so many items."""
    rng = np.random.default_rng(0)
    users_BD, items_ND = (rng.standard_normal((count, 64), dtype=np.float32) for count in (512, items))
    seen = list(rng.integers(items, size=(512, 10)))
    return partial(rank_scores, VectorScores(users_BD, items_ND), rng.integers(items, size=512), seen)


def windows(length: int) -> Action:
    """Return an epoch of windows over histories of so many items."""
    users = 2000
    lengths_U = np.full(users, length, np.int32)
    dataset = PreparedDataset(
        directory=Path(),
        manifest={},
        hash="",
        user_ids=Column(pa.chunked_array([list(range(users))])),
        item_ids=Column(pa.chunked_array([list(range(1000))])),
        titles=Column(pa.chunked_array([[""] * 1000])),
        texts=Column(pa.chunked_array([[""] * 1000])),
        train_counts_N=np.ones(1000, np.int64),
        starts_U=np.arange(users, dtype=np.int64) * length,
        lengths_U=lengths_U,
        train_length_U=lengths_U - 2,
        validation_U=lengths_U - 2,
        test_U=lengths_U - 1,
        item_rows_I=np.random.default_rng(0).integers(0, 1000, users * length).astype(np.int32),
    )
    return partial(read_windows, Windows(dataset, 50))


def read_windows(windows: Windows) -> None:
    """Read an epoch and keep nothing."""
    for batch in windows.batches(128, np.random.default_rng(0)):
        assert batch.n_targets


def own_memory(items: int) -> float:
    """Return the gigabytes that ranking so many items takes, their vectors included."""
    before = memory("VmRSS")
    ranked(items)()
    return (memory("VmHWM") - before) * 2**20 / 1e9
