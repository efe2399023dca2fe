"""Compare full-catalogue ranking with a bare matrix product of the same shapes and threads; measure memory.

Usage: python tools/bench_ranking.py [--users 20000] [--items 12000] [--dim 384] [--seen 10] [--rounds 3]
Goal: a ratio of at most 1.5, and a peak memory that does not grow with the number of users.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from rarec.hardware import peak_memory
from rarec.ranking.rank import SEARCH_USERS, rank_targets

STREAM = 1000
"""Users generated and ranked at a time in the memory measurement, as in an evaluation."""

Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]


def batches(args: argparse.Namespace, users: int, size: int) -> Iterator[Batch]:
    """Yield random user vectors, targets and seen items, `size` users at a time."""
    rng = np.random.default_rng(1)
    for start in range(0, users, size):
        count = min(size, users - start)
        vectors = rng.standard_normal((count, args.dim), dtype=np.float32)
        yield (
            vectors,
            rng.integers(args.items, size=count),
            list(rng.integers(args.items, size=(count, args.seen))),
        )


def catalogue(args: argparse.Namespace) -> npt.NDArray[np.float32]:
    """Return random item vectors."""
    return np.random.default_rng(0).standard_normal((args.items, args.dim), dtype=np.float32)


def bare_product(users: npt.NDArray[np.float32], items: npt.NDArray[np.float32]) -> None:
    """Compute the scores alone, into one buffer."""
    chunk = SEARCH_USERS
    out = torch.empty(chunk, len(items))
    items_DN = torch.from_numpy(items).T
    for part in torch.from_numpy(users).split(chunk):
        torch.mm(part, items_DN, out=out[: len(part)])


def seconds(action: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(args: argparse.Namespace) -> None:
    """Time both in turns, so that a busy machine slows both, and print the fastest of each."""
    items = catalogue(args)
    users, targets, seen = next(batches(args, args.users, args.users))
    bare, ranking = [], []
    for _ in range(args.rounds):
        bare.append(seconds(lambda: bare_product(users, items)))
        ranking.append(seconds(lambda: rank_targets(users, items, targets, seen)))
    flops = 2 * args.users * args.items * args.dim
    print(f"{args.users} users x {args.items} items x {args.dim}, {torch.get_num_threads()} threads")
    print(f"bare matrix product  {min(bare):7.2f} s  {flops / min(bare) / 1e9:6.0f} GFLOP/s")
    print(f"ranking              {min(ranking):7.2f} s  ratio {min(ranking) / min(bare):.2f} (goal: at most 1.5)")


def print_peak(args: argparse.Namespace) -> None:
    """Rank a stream of users and print the peak resident memory in MiB; run in a process of its own."""
    items = catalogue(args)
    for users, targets, seen in batches(args, args.peak_of, STREAM):
        rank_targets(users, items, targets, seen)
    print(peak_memory() / 2**20)


def memory(args: argparse.Namespace) -> None:
    """Print the peak memory for a quarter of the users and for all of them."""
    for users in (args.users // 4, args.users):
        command = [sys.executable, __file__, "--peak-of", str(users)]
        command += ["--items", str(args.items), "--dim", str(args.dim), "--seen", str(args.seen)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"peak memory, {users:7d} users  {peak:7.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in {"users": 20_000, "items": 12_000, "dim": 384, "seen": 10, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print_peak(arguments)
    else:
        compare(arguments)
        memory(arguments)
