"""`data prepare`: prepare logs of two sizes with rarec and with hand-written SQL; the results must agree."""

import argparse
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from rarec.config.schema import Prepare
from rarec.storage.artefacts import read_manifest
from tools.bench.by_hand import FEWEST, prepare_by_hand
from tools.bench.measuring import Figure, apart, at_most, memory, prepare_dataset, seconds
from tools.make_log import make_log

ROWS_OF_A_USER, ROWS_OF_AN_ITEM = 10, 200
JUNK = {"ties": 0.3, "nulls": 0.001, "unknown": 0.001, "duplicates": 0.01, "shuffled": True}
RAREC, BY_HAND = "rarec", "SQL by hand"
TABLES = ("users", "items", "interactions")
GB = 2**20 / 1e9
"""Gigabytes per MiB."""


@dataclass(frozen=True)
class Cost:
    """Time, memory and result of one preparation."""

    seconds: float
    peak: float
    """Peak resident memory in GB."""
    counts: list[dict[str, int]]
    """Initial counts, and those after each step that dropped rows."""
    digests: tuple[Any, ...]
    """Digests of the tables."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the sub-command."""
    parser.add_argument("directory", type=Path, help="directory for the logs (created if missing) and results")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000_000, 100_000_000])
    parser.add_argument("--memory", default="6GB", help="DuckDB memory limit; the process uses somewhat more")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--most", type=float, default=8.0, help="goal for the whole process, in GB")


def run(arguments: argparse.Namespace) -> list[Figure]:
    """Prepare each log with both."""
    figures, per_row = [], []
    for rows in arguments.rows:
        costs = costs_of(arguments, rows)
        spent = {name: min(cost.seconds for cost in own) for name, own in costs.items()}
        peak = {name: max(cost.peak for cost in own) for name, own in costs.items()}
        results = [(cost.counts, cost.digests) for own in costs.values() for cost in own]
        same = results == results[:1] * len(results)
        per_row.append(spent[RAREC] / rows)
        figures += [
            *(Figure(f"{rows:,} rows: {name}", f"{spent[name]:,.1f} s, {peak[name]:.2f} GB") for name in costs),
            Figure(f"{rows:,} rows: same counts and tables", "yes" if same else "no", "yes", same),
            at_most(f"{rows:,} rows: peak resident memory", peak[RAREC], arguments.most, " GB"),
            at_most(f"{rows:,} rows: time, {RAREC} / {BY_HAND}", spent[RAREC] / spent[BY_HAND], 1.5),
        ]
    growth = f"time per row, {arguments.rows[-1]:,} rows / {arguments.rows[0]:,}"
    return [*figures, at_most(growth, per_row[-1] / per_row[0], 1.3)]


def costs_of(arguments: argparse.Namespace, rows: int) -> dict[str, list[Cost]]:
    """Measure both in turns."""
    log, out = log_of(arguments.directory, rows), arguments.directory / "out"
    costs: dict[str, list[Cost]] = {RAREC: [], BY_HAND: []}
    for _ in range(arguments.rounds):
        for name, way in ((RAREC, rarec_of), (BY_HAND, by_hand_of)):
            shutil.rmtree(out, ignore_errors=True)
            costs[name].append(apart(way, log, out, arguments.memory))
            print(f"{rows:,} rows, {name}: {costs[name][-1].seconds:,.1f} s", file=sys.stderr)
    shutil.rmtree(out)
    return costs


def log_of(directory: Path, rows: int) -> Path:
    """Return the log of this size; create it if it is missing."""
    path = directory / f"log-{rows}"
    if not (path / "interactions").is_dir():
        make_log(path, users=rows // ROWS_OF_A_USER, items=rows // ROWS_OF_AN_ITEM, interactions=rows, **JUNK)
    return path


def rarec_of(log: Path, out: Path, limit: str) -> Cost:
    """Prepare with rarec, including the hashing of input and output."""
    items = {"path": str(log / "items.parquet"), "item": "item", "title": "title", "text": ["brand"]}
    interactions = {"path": str(log / "interactions"), "user": "user", "item": "item", "time": "time"}
    fewest = {"min_user_interactions": FEWEST, "min_item_interactions": FEWEST}
    config = Prepare.model_validate({"interactions": interactions, "items": items, "memory": limit, **fewest})
    spent = seconds(partial(prepare_dataset, config, out))
    peak, steps = memory("VmHWM") * GB, read_manifest(out / "prepare", "prepare")["steps"]
    dropping = [step for step in steps if step["interactions_after"] < step["interactions_before"]]
    counts = [counts_of(steps[0], "before"), *(counts_of(step, "after") for step in dropping)]
    return Cost(spent, peak, counts, digests(out / "prepare"))


def by_hand_of(log: Path, out: Path, limit: str) -> Cost:
    """Prepare with SQL."""
    counts: list[dict[str, int]] = []
    spent = seconds(lambda: counts.extend(prepare_by_hand(log, out, limit)))
    return Cost(spent, memory("VmHWM") * GB, counts, digests(out))


def counts_of(step: dict[str, Any], when: str) -> dict[str, int]:
    """Return the counts before or after a step."""
    return {what: step[f"{what}_{when}"] for what in ("interactions", "users", "items")}


def digests(directory: Path) -> tuple[Any, ...]:
    """Return the number of rows of each table, and a digest of all values and row positions."""
    # hashed twice: the hash of a pair is the exclusive or of two hashes, which two exchanged rows would not change
    select = "SELECT count(*), bit_xor(hash(hash(t, file_row_number))) FROM read_parquet('{}') AS t"
    with duckdb.connect() as connection:
        return tuple(connection.execute(select.format(directory / f"{name}.parquet")).fetchone() for name in TABLES)
