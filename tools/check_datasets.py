"""Prepare real logs; check the result against published counts and, row by row, against a second implementation.

    python -m tools.check_datasets PATH

PATH contains, each with interactions.parquet and items.parquet: amazon-beauty-2014 (5-core), ml-1m, ml-100k and
uci-online-retail-2009-2011. Missing datasets are skipped, but one must exist. The exit code is 1 if anything differs.

The second implementation uses pandas and shares no code with rarec. It covers the counts after each step, the fixed
point of the k-core, every user's items in the order of time and of the log's rows, the split, and the number of
training interactions of each item.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from rarec.config.schema import Prepare
from rarec.data.dataset import PreparedDataset
from tools.bench.measuring import options, prepare_dataset

Counts = dict[str, int]
"""Interactions, users, items."""


@dataclass(frozen=True)
class Known:
    """Published counts of a log, and its settings."""

    users: int
    items: int
    interactions: int
    order: str
    """Column with the time or position."""
    fewest: tuple[int, int] = (5, 0)
    """Minimum interactions of a user and of an item; 0 keeps the whole catalogue."""
    clean: bool = True
    """True if no row may be dropped."""
    policies: tuple[str, ...] = ("first",)
    """Values of `prepare.repeats` to check."""

    @property
    def counts(self) -> Counts:
        """The counts of the published log."""
        return {"interactions": self.interactions, "users": self.users, "items": self.items}


KNOWN = {
    "amazon-beauty-2014": Known(22_363, 12_101, 198_502, "position", fewest=(5, 5)),
    "ml-1m": Known(6_040, 3_706, 1_000_209, "position"),
    "ml-100k": Known(943, 1_682, 100_000, "timestamp"),
    "uci-online-retail-2009-2011": Known(
        5_852, 4_619, 765_986, "timestamp", (5, 5), clean=False, policies=("first", "last", "runs", "keep")
    ),
}


class SecondComputation:
    """The same steps in pandas.

    Args:
        directory: directory of the log.
        known: settings of the log.
        policy: value of `prepare.repeats`.

    Attributes:
        steps: counts by step; the rounds of the k-core are one step.
        log: remaining rows `user`, `item`, `order`, in their final order.
        catalogue: remaining item ids.
    """

    def __init__(self, directory: Path, known: Known, policy: str) -> None:
        names = {"user_id": "user", "item_id": "item", known.order: "order"}
        log = pd.read_parquet(directory / "interactions.parquet", columns=list(names)).rename(columns=names)
        catalogue = pd.read_parquet(directory / "items.parquet", columns=["item_id"]).item_id.dropna().unique()
        self.steps: dict[str, Counts] = {}
        log = self._note("read", log)
        log = self._note("ids", log.dropna(subset=["user", "item"]))
        log = self._note("catalogue", log[log["item"].isin(catalogue)])
        log = in_order(self._note("duplicates", log.drop_duplicates()))
        log = self._note("repeats", without_repeats(log, policy))
        self.log = self._note("core", core(log, dict(zip(("user", "item"), known.fewest, strict=True))))
        self.catalogue = sorted(self.log["item"].unique() if known.fewest[1] else catalogue)

    def _note(self, step: str, log: pd.DataFrame) -> pd.DataFrame:
        """Count the rows that a step leaves."""
        self.steps[step] = {"interactions": len(log), "users": log.user.nunique(), "items": log["item"].nunique()}
        return log

    def tables(self) -> Iterator[tuple[str, Any]]:
        """Yield the written columns: users and their split, items, interactions."""
        users = self.log.groupby("user").size()
        enough = users >= 3
        train = (users - 2).where(enough, users)
        behind = self.log.groupby("user").cumcount(ascending=False)
        trained = self.log["item"][(behind >= 2) | ~self.log.user.map(enough)].value_counts()
        yield "user_ids", users.index
        yield "item_ids", self.catalogue
        yield "lengths_U", users
        yield "starts_U", users.cumsum() - users
        yield "train_length_U", train
        yield "validation_U", train.where(enough, -1)
        yield "test_U", (users - 1).where(enough, -1)
        yield "item_rows_I", pd.Index(self.catalogue).get_indexer(self.log["item"])
        yield "train_counts_N", trained.reindex(self.catalogue, fill_value=0)

    def ties(self) -> tuple[int, int]:
        """Count interactions with the same time as another of the user, and users whose targets have none."""
        tied = self.log.duplicated(["user", "order"], keep=False)
        targets = self.log.groupby("user").cumcount(ascending=False) < 2
        return int(tied.sum()), self.log.user.nunique() - self.log.user[tied & targets].nunique()


def in_order(log: pd.DataFrame) -> pd.DataFrame:
    """Sort by user and time; rows of one time stay in the order of the log."""
    return log.sort_values(["user", "order"], kind="stable", ignore_index=True)


def without_repeats(log: pd.DataFrame, policy: str) -> pd.DataFrame:
    """Drop repeats according to `prepare.repeats`."""
    pairs = log[["user", "item"]]
    match policy:
        case "first" | "last":
            return log[~pairs.duplicated(keep=policy)]
        case "runs":
            return log[(pairs != pairs.shift()).any(axis=1)]
    return log


def core(log: pd.DataFrame, fewest: dict[str, int]) -> pd.DataFrame:
    """Return the k-core: the largest part in which all users and items have enough interactions."""
    while True:
        enough = [log.groupby(name)[name].transform("size") >= least for name, least in fewest.items()]
        if np.all(enough):
            return log
        log = log[enough[0] & enough[1]]


def configure(directory: Path, known: Known, policy: str) -> Prepare:
    """Return the settings for rarec."""
    role = "time" if known.order == "timestamp" else "position"
    log = {"path": str(directory / "interactions.parquet"), "user": "user_id", "item": "item_id", role: known.order}
    items = {"path": str(directory / "items.parquet"), "item": "item_id", "title": "title"}
    fewest = dict(zip(("min_user_interactions", "min_item_interactions"), known.fewest, strict=True))
    return Prepare.model_validate({"interactions": log, "items": items, "repeats": policy, **fewest})


def steps_of(dataset: PreparedDataset) -> dict[str, Counts]:
    """Return the manifest's counts in the form of `SecondComputation.steps`."""
    entries = dataset.manifest["steps"]
    counts = {"read": {what: entries[0][f"{what}_before"] for what in ("interactions", "users", "items")}}
    after = {entry["step"]: {what: entry[f"{what}_after"] for what in counts["read"]} for entry in entries}
    for step in ("ids", "catalogue", "duplicates", "repeats"):
        counts[step] = after.get(step, list(counts.values())[-1])
    return {**counts, "core": {what: entries[-1][f"{what}_after"] for what in counts["read"]}}


def differences(dataset: PreparedDataset, second: SecondComputation, known: Known) -> Iterator[str]:
    """Yield one line for each difference."""
    steps = steps_of(dataset)
    for step in ("read", "core") if known.clean else ("read",):
        if steps[step] != known.counts:
            yield f"{step}: {steps[step]}, but {known.counts} was published"
    for step, counts in second.steps.items():
        if steps[step] != counts:
            yield f"{step}: {steps[step]}, but the second computation gives {counts}"
    order = "time" if known.order == "timestamp" else "position"
    orders = pq.read_table(dataset.directory / "interactions.parquet")[order].to_numpy()
    for name, wanted in [*second.tables(), (order, second.log.order)]:
        column = orders if name == order else getattr(dataset, name)
        if not np.array_equal(np.asarray(column), np.asarray(wanted)):
            yield f"{name} differs from the second computation"


def check(directory: Path, known: Known, policy: str, scratch: Path) -> bool:
    """Prepare a log with both, print the result, and return True if nothing differs."""
    dataset = prepare_dataset(configure(directory, known, policy), scratch)
    second = SecondComputation(directory, known, policy)
    wrong = list(differences(dataset, second, known))
    tied, untied = second.ties()
    left = ", ".join(f"{count:,} {what}" for what, count in steps_of(dataset)["core"].items())
    after = ", ".join(f"{step} {counts['interactions']:,}" for step, counts in second.steps.items())
    print(f"{'WRONG' if wrong else 'ok':5} {directory.name}, repeats: {policy}: {left}")
    print(f"      interactions after each step: {after}")
    print(f"      {tied:,} interactions in ties; no tie decides the targets of {untied:,} users")
    for line in wrong:
        print(f"      {line}")
    return not wrong


def main() -> int:
    """Check every log that exists."""
    path, right = options(__doc__, "path").path, []
    for name, known in KNOWN.items():
        if not (path / name / "interactions.parquet").is_file():
            print(f"skip  {name}: not in {path}")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            right += [check(path / name, known, policy, Path(scratch) / policy) for policy in known.policies]
    if not right:
        print(f"none of {', '.join(KNOWN)} is in {path}")
    return 0 if right and all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
