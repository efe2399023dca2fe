"""`data ids`: open a large table of ID embeddings and gather rows; compare with a bare `np.memmap`.

Shape letters: N items, E dimension, G rows of a gather.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rarec.ids.source import ITEMS_FILE, KIND, open_source
from rarec.storage.artefacts import write_manifest
from tools.bench.measuring import Figure, apart, at_least, at_most, memory

DIM, BATCH, HISTORY, ROUNDS = 64, 64, 50, 8
RULE = {"kind": "rule", "rule": "recency", "half_life": 5.0, "max_history": HISTORY}
CHUNK = 1 << 16

Floats = npt.NDArray[np.float32]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the sub-command."""
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--batches", type=int, default=200, help="gathers of 64 histories of 50 items per round")
    parser.add_argument("--directory", type=Path, help="scratch directory; the default is the one for temporary files")


def run(arguments: argparse.Namespace) -> list[Figure]:
    """Write the table, open it, gather from it, and delete it."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        directory = Path(scratch)
        write_table(directory, arguments.rows)
        size = (directory / ITEMS_FILE).stat().st_size / 1e6
        opening, held = apart(memory_of, directory, arguments.batches)
        figures = [
            Figure(f"table of {arguments.rows:,} x {DIM}", f"{size:,.0f} MB"),
            at_most("memory used by opening it", opening, 10, " MiB"),
            at_most(f"memory without pages of the file, after {arguments.batches} gathers", held, 50, " MiB"),
        ]
        for cold in (True, False):
            figures += apart(speed_of, directory, arguments.batches // (20 if cold else 1), cold)
    return figures


def write_table(directory: Path, rows: int) -> None:
    """Write an artefact of `rarec ids` with imported vectors."""
    block = np.random.default_rng(0).standard_normal((CHUNK, DIM), dtype=np.float32)
    table_NE = np.lib.format.open_memmap(directory / ITEMS_FILE, mode="w+", dtype=np.float32, shape=(rows, DIM))
    for start in range(0, rows, CHUNK):
        table_NE[start : start + CHUNK] = block[: rows - start]
    table_NE.flush()
    write_manifest(directory, KIND, settings={"users": RULE}, made_from={}, name="id")


def memory_of(directory: Path, batches: int) -> tuple[float, float]:
    """Return MiB used by opening the table, and, without pages of the file, after computing user vectors."""
    resident, own = memory("VmRSS"), memory("RssAnon")
    source = open_source(directory)
    opening = memory("VmRSS") - resident
    rng = np.random.default_rng(1)
    for _ in range(batches):
        source.user_vectors(np.arange(BATCH), list(rng.integers(len(source.items_NE), size=(BATCH, HISTORY))))
    return opening, memory("RssAnon") - own


def speed_of(directory: Path, batches: int, cold: bool) -> list[Figure]:
    """Measure gathers of random rows, rarec and bare in turns; cold: after dropping the file from the page cache."""
    openers: dict[str, Callable[[], Floats]] = {
        "rarec": lambda: open_source(directory).items_NE,
        "bare": lambda: np.load(directory / ITEMS_FILE, mmap_mode="r"),
    }
    rates: dict[str, list[float]] = {name: [] for name in openers}
    for turn in range(ROUNDS):
        for name, opened in sorted(openers.items(), reverse=bool(turn % 2)):
            if cold:
                drop_from_cache(directory / ITEMS_FILE)
            rows_G = np.random.default_rng(turn).integers(len(opened()), size=(batches, BATCH * HISTORY))
            rates[name].append(rate(opened(), rows_G))
    per_second = statistics.median(rates["rarec"])
    ratio = statistics.median(rarec / bare for rarec, bare in zip(rates["rarec"], rates["bare"], strict=True))
    state = "from the disk" if cold else "from the page cache"
    figure = f"{per_second / BATCH / HISTORY:,.0f} batches/s, {per_second * DIM * 4 / 1e6:,.0f} MB/s"
    return [Figure(f"gathers {state}", figure), at_least(f"gathers {state}, rarec / bare np.memmap", ratio, 0.9)]


def rate(table_NE: Floats, batches: npt.NDArray[np.int64]) -> float:
    """Return gathered rows per second."""
    started = time.perf_counter()
    for rows_G in batches:
        table_NE[rows_G]
    return batches.size / (time.perf_counter() - started)


def drop_from_cache(path: Path) -> None:
    """Drop the pages of an unmapped file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
