"""Shared by the benchmarks: a table of figures beside their goals, timing, memory, and separate processes."""

import multiprocessing
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from rarec.config import RunConfig
from rarec.config.schema import Prepare
from rarec.console.last_resort import WAITING
from rarec.data.dataset import PreparedDataset
from rarec.stages.run import Run

T = TypeVar("T")


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
    """One row of bench.py: this project beside another way to do the same.

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

    def with_ratio(self, ratio: float) -> "Row":
        """Return the same row with a ratio of its own, such as the median over pairs."""
        return replace(self, ratio=ratio)

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


def print_table(figures: list[Figure]) -> None:
    """Print figures as a table."""
    rows = [("what", "figure", "goal", "met")]
    rows += [(one.what, one.figure, one.goal, {None: "", True: "yes", False: "NO"}[one.met]) for one in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for what, figure, goal, met in rows:
        print(f"{what:{widths[0]}}  {figure:>{widths[1]}}  {goal:{widths[2]}}  {met}".rstrip())


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process: it holds nothing of this one's memory, and its threads wait as rarec's do."""
    os.environ |= WAITING
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def seconds(action: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def memory(field: str) -> float:
    """Return memory of this process in MiB: `VmHWM` (peak resident), `VmRSS` (resident) or `RssAnon` (anonymous)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def model_tree(**sections: Any) -> dict[str, Any]:
    """Return a configuration for what reads no data: the sections that are given, and no run and no log."""
    nothing = {"path": "-", "user": "-", "item": "-", "time": "-"}
    prepare = {"interactions": nothing, "items": {"path": "-", "item": "-", "title": "-"}}
    return {"run": {"dir": "-"}, "prepare": prepare, **sections}


def prepare_dataset(config: Prepare, directory: Path) -> PreparedDataset:
    """Prepare a dataset as `rarec prepare` does, in `directory/prepare`."""
    tree = {"run": {"dir": str(directory)}, "prepare": config.model_dump(mode="json"), "llm": {"path": "-"}}
    run = Run(RunConfig.model_validate(tree), say=lambda line: None)
    run.make("prepare", fresh=True)
    return run.dataset


def rows_of(module: str, quick: bool) -> list[Row]:
    """Return the rows of a part of `python -m tools.bench`."""
    rows: list[Row] = import_module(f"tools.bench.{module}").rows(quick)
    return rows
