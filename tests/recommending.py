"""Recommendations for a user of a run's dataset, by its bundle alone."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import rarec
from rarec import cli_bundle
from rarec.bundle.bundle import FACTS
from rarec.bundle.recommended import Recommended
from rarec.bundle.recommender import Recommender
from rarec.bundle.users import recommend_all
from rarec.bundle.write import next_version
from rarec.entry import open_run
from rarec.stages.run import Run
from rarec.storage.artefacts import read_manifest, write_manifest
from rarec.storage.files import read_json
from tests.test_readers import write_table


def histories(run: Run, users: list[str]) -> list[list[str]]:
    """Return all items of some users, as ids, oldest first."""
    dataset = run.dataset
    rows = [list(map(str, dataset.user_ids)).index(user) for user in users]
    return [[dataset.item_ids[int(item)] for item in dataset.sequence(row)] for row in rows]


def recommend(run: Run, user: str, k: int, bundle: Path | None = None, **options) -> list[Recommended]:
    """Return the best new items for a user."""
    return rarec.load(bundle or run.directory("export"), **options).recommend(histories(run, [user]), k)[0]


def tied_log(directory: Path, items: Sequence[str], suffix: str = "csv") -> dict[str, list[str]]:
    """Write a log of 200 users full of ties, two files of shuffled rows; return the histories in the log's order."""
    rng = np.random.default_rng(0)
    events = [
        (f"t{user:03d}", str(item), 1_700_000_000 + int(rng.integers(2)))
        for user in range(200)
        for item in rng.choice(items, rng.integers(2, 9), replace=False)
    ]
    rows = [events[place] for place in rng.permutation(len(events))]
    directory.mkdir()
    for name, part in (("a", rows[: len(rows) // 2]), ("b", rows[len(rows) // 2 :])):
        write_table(directory / f"{name}.{suffix}", ["user", "item", "time"], part)
    histories: dict[str, list[str]] = {user: [] for user, *_ in events}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):  # a stable sort
        histories[user].append(item)
    return histories


def batch_of(recommender: Recommender, log: Path) -> dict[str, list[Recommended]]:
    """Return the ten best items of every user of a log, as `rarec recommend --all` writes them."""
    with tempfile.TemporaryDirectory() as scratch:
        recommend_all(recommender, str(log), Path(scratch, "top.parquet"), 10)
        rows = pq.read_table(Path(scratch, "top.parquet")).to_pylist()
    return {
        user: [Recommended(row["item"], row["title"], row["score"]) for row in own]
        for user, own in groupby(rows, key=itemgetter("user"))
    }


def exported(run: Run, directory: Path, *overrides: str) -> Run:
    """Export a finished run once more, in another folder."""
    root = shutil.copytree(run.root, directory / "run")
    other = open_run(run.file, [f"run.dir={root}", *overrides])
    other.make("export", fresh=True)
    return other


def with_items(bundle: Path, table: Path, out: Path | None = None, **options) -> Path:
    """Return the new version that `rarec items add` writes."""
    made = out or next_version(bundle)
    cli_bundle.add(bundle, str(table), out=out, **options)
    return made


def without_items(bundle: Path, items: list[str], out: Path | None = None) -> Path:
    """Return the new version that `rarec items remove` writes."""
    made = out or next_version(bundle)
    cli_bundle.remove(bundle, items, out)
    return made


def sealed(bundle: Path, **changes: object) -> None:
    """Change facts of a bundle, and its manifest with them."""
    if changes:
        (bundle / FACTS).write_text(json.dumps({**read_json(bundle / FACTS), **changes}))  # NaN as well
    manifest = read_manifest(bundle, "bundle")
    write_manifest(bundle, "bundle", settings=manifest["settings"], made_from=manifest["made_from"])
