"""Shared by the benchmarks: options, figures beside their goals, timing in turns, memory, and separate processes."""

import argparse
import multiprocessing
import os
import queue
import re
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rarec.config import RunConfig
from rarec.config.schema import Prepare
from rarec.console.last_resort import WAITING
from rarec.data.dataset import PreparedDataset
from rarec.stages.run import Run

T = TypeVar("T")
Name = TypeVar("Name", str, int, tuple[str, int])
Action = Callable[[], object]
GB = 2**20 / 1e9
"""Gigabytes per MiB."""


def options(doc: str | None, *paths: str, **defaults: Any) -> argparse.Namespace:
    """Parse the command line.

    Args:
        doc: docstring of the module, which --help prints.
        paths: names of the arguments, all of them paths.
        defaults: value of each option where it is not given; False makes a flag, a list an option of several values,
            a type an option of that type without a default, a list of a type one of several such values.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for path in paths:
        parser.add_argument(path, type=Path)
    for name, default in defaults.items():
        add_option(parser, name, default)
    return parser.parse_args()


def add_option(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    """Add an option, whose type is that of its default."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        parser.add_argument(flag, action="store_true")
    elif isinstance(default, list):
        kind = default[0] if isinstance(default[0], type) else type(default[0])
        parser.add_argument(flag, nargs="+", type=kind, default=None if kind is default[0] else default)
    else:
        kind = default if isinstance(default, type) else type(default)
        parser.add_argument(flag, type=kind, default=None if kind is default else default)


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        what: name of the figure.
        figure: its value as text.
        goal: its goal as text; empty if there is none.
        met: whether the goal is met; None if there is none.
    """

    what: str
    figure: str
    goal: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Row:
    """One row of `python -m tools.bench`: this project beside another way to do the same.

    Attributes:
        name: what is compared.
        ours: figure of this project.
        other: figure of the other way, measured in turns with ours.
        unit: of both.
        ratio: ours to theirs; of speeds more is better, of times and memory less.
        goal: the least or the largest ratio.
        is_least: whether the goal is the least.
    """

    name: str
    ours: float
    other: float
    unit: str
    ratio: float
    goal: float
    is_least: bool

    @classmethod
    def least(cls, name: str, ours: float, other: float, goal: float, unit: str) -> "Row":
        """Return a row whose ratio should be large."""
        return cls(name, ours, other, unit, ours / other, goal, True)

    @classmethod
    def most(cls, name: str, ours: float, other: float, goal: float, unit: str) -> "Row":
        """Return a row whose ratio should be small."""
        return cls(name, ours, other, unit, ours / other, goal, False)

    @property
    def met(self) -> bool:
        """Return whether the goal is met."""
        return self.ratio >= self.goal if self.is_least else self.ratio <= self.goal

    def figure(self) -> Figure:
        """Return the row of the printed table."""
        values = f"{self.ours:,.4g} / {self.other:,.4g} {self.unit} = {self.ratio:.2f}"
        return Figure(self.name, values, f"at {'least' if self.is_least else 'most'} {self.goal:g}", self.met)


def at_most(what: str, value: float, goal: float, unit: str = "") -> Figure:
    """Return a figure whose goal is a maximum."""
    return Figure(what, f"{value:,.2f}{unit}", f"at most {goal:g}{unit}", value <= goal)


def at_least(what: str, value: float, goal: float, unit: str = "") -> Figure:
    """Return a figure whose goal is a minimum."""
    return Figure(what, f"{value:,.2f}{unit}", f"at least {goal:g}{unit}", value >= goal)


def print_table(figures: Sequence[Figure]) -> None:
    """Print figures as a table."""
    rows = [("what", "figure", "goal", "met")]
    rows += [(row.what, row.figure, row.goal, {None: "", True: "yes", False: "NO"}[row.met]) for row in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for what, figure, goal, met in rows:
        print(f"{what:{widths[0]}}  {figure:>{widths[1]}}  {goal:{widths[2]}}  {met}".rstrip())


def seconds(action: Action, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one call, by the clock on the wall or another."""
    start = clock()
    action()
    return clock() - start


def in_turns(
    rounds: int, actions: Mapping[Name, Action], clock: Callable[[], float] = time.perf_counter
) -> dict[Name, np.ndarray]:
    """Return the seconds of each action in each round; they take turns, and a round before the first warms up."""
    spent = [[seconds(action, clock) for action in actions.values()] for _ in range(rounds + 1)]
    return dict(zip(actions, np.array(spent[1:]).T, strict=True))


def cpu_seconds(command: Sequence[str], cwd: Path | None = None) -> float:
    """Return the processor seconds of a command, which must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=cwd, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def memory(field: str) -> float:
    """Return memory of this process in MiB: `VmHWM` (peak resident), `VmRSS` (resident) or `RssAnon` (anonymous)."""
    line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) / 1024


@contextmanager
def sampled_memory() -> Iterator[list[float]]:
    """Sample this process's anonymous memory within the context, in MiB; the first value is that at the start."""
    samples, over = [memory("RssAnon")], threading.Event()

    def sample() -> None:
        while not over.wait(0.005):
            samples.append(memory("RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process: it holds nothing of this one's memory, and its threads wait as rarec's do."""
    os.environ |= WAITING
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def on_ranks(ranks: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on new processes of one thread each, which find each other; return what rank 0 returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    launched = [(rank, ranks, port, results, function, arguments) for rank in range(ranks)]
    processes = [context.Process(target=_as_rank, args=own) for own in launched]
    for process in processes:
        process.start()
    own: dict[int, Any] = {}
    while len(own) < ranks:
        try:
            rank, result = results.get(timeout=1)
        except queue.Empty:
            dead = [rank for rank, process in enumerate(processes) if rank not in own and process.exitcode is not None]
            if dead:
                own |= {rank: RuntimeError(f"rank {rank} ended without a result") for rank in range(ranks)}
        else:
            own[rank] = result
    for process in processes:
        process.kill()  # an engine may hang on its way out
    for result in own.values():
        if isinstance(result, Exception):
            raise result
    first: T = own[0]
    return first


def _as_rank(rank: int, ranks: int, port: int, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in launched.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    try:
        results.put((rank, function(*arguments)))
    except Exception as error:  # the caller raises it
        results.put((rank, error))


def model_tree(**sections: Any) -> dict[str, Any]:
    """Return a configuration for what reads no data: the given sections, and no run and no log."""
    nothing = {"path": "-", "user": "-", "item": "-", "time": "-"}
    prepare = {"interactions": nothing, "items": {"path": "-", "item": "-", "title": "-"}}
    return {"run": {"dir": "-"}, "prepare": prepare, **sections}


def log_section(log: Path, **fields: Any) -> dict[str, Any]:
    """Return the section `prepare` for a log of `make_log`."""
    interactions = {"path": str(log / "interactions"), "user": "user", "item": "item", "time": "time"}
    items = {"path": str(log / "items.parquet"), "item": "item", "title": "title", "text": ["brand"]}
    return {"interactions": interactions, "items": items, **fields}


def prepare_dataset(config: Prepare, directory: Path) -> PreparedDataset:
    """Prepare a dataset as `rarec prepare` does, in `directory/prepare`."""
    tree = {"run": {"dir": str(directory)}, "prepare": config.model_dump(mode="json"), "llm": {"path": "-"}}
    run = Run(RunConfig.model_validate(tree), say=lambda line: None)
    run.make("prepare", fresh=True)
    return run.dataset


def rows_of(part: str, quick: bool) -> list[Row]:
    """Return the rows of a part of `python -m tools.bench`, which is named as `module.function`."""
    module, _, function = part.partition(".")
    rows: list[Row] = getattr(import_module(f"tools.bench.{module}"), function)(quick)
    return rows
