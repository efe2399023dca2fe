"""Part `ids` of bench.py: training an ID model on one rank and on two, with a small item table and a large one.

Each rank has one thread. SASRec with the default recipe; batches of 256 windows of 1 to 50 targets at random. Memory is
what is due to the table and Adam's state. Rounds are interleaved; medians.
"""

import multiprocessing
import os
import socket
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
from tools.bench.measuring import Row, memory, seconds

SMALL, LARGE = 100_000, 10_000_000
BATCH = 256


def batches(items: int, steps: int) -> Iterator[Batch]:
    """Yield random windows, the same on every rank."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        lengths_B = torch.from_numpy(rng.integers(1, 51, BATCH))
        yield Batch(torch.from_numpy(rng.integers(0, items, (BATCH, 51))), lengths_B)


def train(
    rank: int, ranks: int, port: int, items: int, steps: int, found: "multiprocessing.Queue[tuple[float, ...]]"
) -> None:
    """Train on one rank; rank 0 puts the seconds of a step and the gigabytes of the table into the queue."""
    torch.set_num_threads(1)
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in launched.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    world = join_world("cpu", "device", "cpu")
    before = memory("RssAnon")
    torch.manual_seed(0)  # ranks draw alike
    recipe = SasRecConfig(batch_size=BATCH)
    training = Training(recipe, np.ones(items, bool), 0, CheckpointStore(Path(), 0, ""), world)
    took = [seconds(partial(training.step, 1, batch)) for batch in batches(items, steps)]
    if rank == 0:
        found.put((statistics.median(took), (memory("RssAnon") - before) / 1024))


def measured(ranks: int, items: int, steps: int) -> tuple[float, float]:
    """Return the seconds of a step and the gigabytes of a rank."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=train, args=(rank, ranks, port, items, steps, found)) for rank in range(ranks)]
    for process in processes:
        process.start()
    took, held = found.get()
    for process in processes:
        process.join()
    return took, held


def rows(quick: bool) -> list[Row]:
    """Measure one rank and two, a small table and, if it is not to be quick, a large one."""
    cases = {"one": (1, SMALL), "two": (2, SMALL)}
    if not quick:
        cases |= {"large": (1, LARGE), "large on two": (2, LARGE)}
    rounds = [
        {name: measured(*case, 15 if quick else 40) for name, case in cases.items()} for _ in range(1 if quick else 3)
    ]
    took, held = ({name: statistics.median(each[name][which] for each in rounds) for name in cases} for which in (0, 1))
    found = [Row.least("ID model: two ranks / one", BATCH / took["two"], BATCH / took["one"], 1.6, "windows/s")]
    if not quick:
        found += [
            Row.most("ID model: a step with 10 million items / 100,000", took["large"], took["one"], 1.5, "s"),
            Row.most(
                "ID model: memory of one of two ranks / one process", held["large on two"], held["large"], 0.6, "GB"
            ),
        ]
    return found
