"""Part `ids` of `python -m tools.bench`: training an ID model on one rank and on two, with a small and a large table.

Each rank has one thread. SASRec with the default recipe; batches of 256 windows of 1 to 50 targets at random. Memory is
what is due to the table and Adam's state. Rounds are interleaved; medians.
"""

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rarec.config.ids import SasRecConfig
from rarec.ids.objective import Batch
from rarec.ids.trainer import Training
from rarec.storage.checkpoint_store import CheckpointStore
from rarec.training.accelerator import join_world
from tools.bench.measuring import Row, memory, on_ranks, seconds

SMALL, LARGE = 100_000, 10_000_000
BATCH = 256


def batches(items: int, steps: int) -> Iterator[Batch]:
    """Yield random windows, the same on every rank."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        lengths_B = torch.from_numpy(rng.integers(1, 51, BATCH))
        yield Batch(torch.from_numpy(rng.integers(0, items, (BATCH, 51))), lengths_B)


def train(items: int, steps: int) -> tuple[float, float]:
    """Train on one rank; return the seconds of a step and the gigabytes of the table."""
    world = join_world("cpu", "device", "cpu")
    before = memory("RssAnon")
    torch.manual_seed(0)  # ranks draw alike
    recipe = SasRecConfig(batch_size=BATCH)
    training = Training(recipe, np.ones(items, bool), 0, CheckpointStore(Path(), 0, ""), world)
    spent = [seconds(partial(training.step, 1, batch)) for batch in batches(items, steps)]
    return statistics.median(spent), (memory("RssAnon") - before) / 1024


def rows(quick: bool) -> list[Row]:
    """Measure one rank and two, a small table and, if it is not to be quick, a large one."""
    cases = {"one": (1, SMALL), "two": (2, SMALL)}
    if not quick:
        cases |= {"large": (1, LARGE), "large on two": (2, LARGE)}
    rounds = [
        {name: on_ranks(ranks, train, items, 15 if quick else 40) for name, (ranks, items) in cases.items()}
        for _ in range(1 if quick else 3)
    ]
    took, held = ({name: statistics.median(each[name][which] for each in rounds) for name in cases} for which in (0, 1))
    speed = Row.least("ID model: two ranks / one", BATCH / took["two"], BATCH / took["one"], 1.6, "windows/s")
    if quick:
        return [speed]
    name = "ID model: memory of one of two ranks / one process"
    return [
        speed,
        Row.most("ID model: a step with 10 million items / 100,000", took["large"], took["one"], 1.5, "s"),
        Row.most(name, held["large on two"], held["large"], 0.6, "GB"),
    ]
