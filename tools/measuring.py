"""What the benchmarks of data share: a table of figures beside their goals, and fresh processes to measure in."""

import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One line of the table; `met` is None where there is no goal."""

    what: str
    figure: str
    goal: str = ""
    met: bool | None = None


def at_most(what: str, value: float, goal: float, unit: str = "") -> Figure:
    """A figure that should not be above its goal."""
    return Figure(what, f"{value:,.2f}{unit}", f"at most {goal:g}{unit}", value <= goal)


def at_least(what: str, value: float, goal: float, unit: str = "") -> Figure:
    """A figure that should not be below its goal."""
    return Figure(what, f"{value:,.2f}{unit}", f"at least {goal:g}{unit}", value >= goal)


def print_table(figures: list[Figure]) -> None:
    """Print the table."""
    rows = [("what", "figure", "goal", "met")]
    rows += [(one.what, one.figure, one.goal, {None: "", True: "yes", False: "NO"}[one.met]) for one in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for what, figure, goal, met in rows:
        print(f"{what:{widths[0]}}  {figure:>{widths[1]}}  {goal:{widths[2]}}  {met}".rstrip())


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a fresh process, which holds nothing of what was done here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def memory(field: str) -> float:
    """Of this process, in MiB: `VmHWM` (the most that was resident), `VmRSS` (resident), `RssAnon` (not of files)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
