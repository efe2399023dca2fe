"""Recommendations for a user of a run's dataset, by its bundle alone."""

import json
import shutil
from pathlib import Path

import rarec
from rarec import cli_bundle
from rarec.bundle.bundle import FACTS
from rarec.bundle.recommended import Recommended
from rarec.bundle.write import next_version
from rarec.entry import open_run
from rarec.stages.run import Run
from rarec.storage.artefacts import read_manifest, write_manifest
from rarec.storage.files import read_json


def histories(run: Run, users: list[str]) -> list[list[str]]:
    """Return all items of some users, as ids, oldest first."""
    dataset = run.dataset
    rows = [list(map(str, dataset.user_ids)).index(user) for user in users]
    return [[dataset.item_ids[int(item)] for item in dataset.sequence(row)] for row in rows]


def recommend(run: Run, user: str, k: int, bundle: Path | None = None, **options) -> list[Recommended]:
    """Return the best new items for a user."""
    return rarec.load(bundle or run.directory("export"), **options).recommend(histories(run, [user]), k)[0]


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
