"""Part `data` of bench.py: the stream beside a bare tar and decode, preparation beside SQL written by hand.

`python -m tools.bench.data has` more on both, memory and large logs included.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

from tools.bench.data_prepare import BY_HAND, RAREC, costs_of
from tools.bench.data_stream import read_bare, read_epoch, stream_of, write_different
from tools.bench.measuring import Row, seconds


def rows(quick: bool) -> list[Row]:
    """Measure both."""
    with tempfile.TemporaryDirectory() as scratch:
        return [
            stream(Path(scratch) / "shards", 3 if quick else 20, 3),
            prepare(Path(scratch), 300_000 if quick else 10_000_000),
        ]


def stream(directory: Path, shards: int, rounds: int) -> Row:
    """Read whole epochs, and whole tars, in turns."""
    write_different(directory, shards, 1024)
    plan, samples = stream_of(directory, "batch_size")
    spent = [
        (seconds(partial(read_epoch, plan, samples, epoch)), seconds(partial(read_bare, directory)))
        for epoch in range(rounds + 1)
    ]
    ours, bare = (plan.samples / statistics.median(times) for times in zip(*spent[1:], strict=True))
    return Row.least("stream / bare tar and decode", ours, bare, 0.9, "samples/s")


def prepare(directory: Path, interactions: int) -> Row:
    """Prepare a log in both ways."""
    costs = costs_of(argparse.Namespace(directory=directory, memory="6GB", rounds=1), interactions)
    ours, other = (min(cost.seconds for cost in costs[way]) for way in (RAREC, BY_HAND))
    return Row.most(f"preparation / SQL by hand, {interactions:,} interactions", ours, other, 1.5, "s")
