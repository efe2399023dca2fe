"""Measure the training of an ID model: on one rank and on two, with a small item table and a large one.

    python tools/bench_ids.py [--items 10_000_000] [--steps 40] [--rounds 3]

| row | figure |
| --- | --- |
| two ranks | windows a second of two ranks with a thread each, over those of one rank with one thread; batches of 256 |
| large table | seconds of a step with --items items, over those with 100,000 |
| half the table | memory of one of two ranks that is due to the table and Adam's state, over that of a single process |

SASRec with the default recipe; windows of 1 to 50 targets at random. Rounds are interleaved; medians.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import Figure, at_least, at_most, memory, print_table, seconds

from rarec.checkpoint_store import CheckpointStore
from rarec.config.ids import SasRecConfig
from rarec.ids.trainer import Training
from rarec.ids.windows import Batch
from rarec.training.accelerator import join_world

SMALL = 100_000
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


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    cases = {"one": (1, SMALL), "two": (2, SMALL), "large": (1, arguments.items), "large on two": (2, arguments.items)}
    rounds = [{name: measured(*case, arguments.steps) for name, case in cases.items()} for _ in range(arguments.rounds)]
    took, held = ({name: statistics.median(each[name][which] for each in rounds) for name in cases} for which in (0, 1))
    print_table(
        [
            Figure("windows/s, one rank and two", f"{BATCH / took['one']:.0f}, {BATCH / took['two']:.0f}"),
            at_least("two ranks", took["one"] / took["two"], 1.6),
            at_most("large table", took["large"] / took["one"], 1.5),
            Figure("GB with the large table, one rank and two", f"{held['large']:.2f}, {held['large on two']:.2f}"),
            at_most("half the table", held["large on two"] / held["large"], 0.6),
        ]
    )


if __name__ == "__main__":
    main()
