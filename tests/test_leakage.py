"""Test that validation and test targets do not reach training, and that a forged leak is refused."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rarec.data.dataset import PreparedDataset, check_no_leaks
from rarec.data.selection import select_samples
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import VectorRanker, rank_users
from tests.conftest import make_world
from tests.datasets import prepared

FIXED = ["ids.sasrec.epochs=1", "shards.denoise=true", "shards.diversify=true"]
"""One epoch: which epoch is best is for the validation targets to say."""


def change_last(log: Path, places: tuple[int, ...]) -> None:
    """Give every user another item at these places from the end, one that the user does not have."""
    rows = list(csv.DictReader(log.open()))
    of_user: dict[str, list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: int(row["time"])):
        of_user.setdefault(row["user"], []).append(row)
    for own in of_user.values():
        seen = {row["item"] for row in own}
        fresh = (f"i{item:03d}" for item in range(40) if f"i{item:03d}" not in seen)
        for place in places:
            own[-place]["item"] = next(fresh)
    with log.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["user", "item", "time"])
        writer.writeheader()
        writer.writerows(rows)


def trained_from(config: Path) -> dict[str, Any]:
    """Run the stages before training; return everything that training reads."""
    run = open_run(config, FIXED)
    run.run(["prepare", "ids", "shards"])
    shard_files = sorted(run.directory("shards").glob("*.tar"))
    selection = select_samples(run.dataset, run.config.shards, 17)
    return {
        "counts": run.dataset.train_counts_N.tolist(),
        "selection": (selection.user_rows.tolist(), selection.positions.tolist()),
        "ID vectors": (run.directory("ids", "id") / "items.npy").read_bytes(),
        "tars": [path.read_bytes() for path in shard_files],
        "states": (run.directory("shards") / "item_states.npy").read_bytes(),
    }


@pytest.mark.slow
def test_other_validation_and_test_targets_change_nothing_that_is_trained_on(tmp_path: Path) -> None:
    first = trained_from(make_world(tmp_path / "a"))
    other = make_world(tmp_path / "b")
    change_last(tmp_path / "b" / "log" / "interactions.csv", (1, 2))
    assert trained_from(other) == first


@pytest.mark.slow
def test_other_training_interactions_do_change_it(tmp_path: Path) -> None:
    first = trained_from(make_world(tmp_path / "a"))
    other = make_world(tmp_path / "b")
    change_last(tmp_path / "b" / "log" / "interactions.csv", (3,))
    second = trained_from(other)
    assert [name for name in first if first[name] == second[name]] in ([], ["states"])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return prepared(tmp_path_factory.mktemp("clean"))


def forged(dataset: PreparedDataset, field: str, user: int, value: int) -> PreparedDataset:
    array = np.array(getattr(dataset, field))
    array[user] = value
    return replace(dataset, **{field: array})


def test_a_clean_dataset_passes(dataset: PreparedDataset) -> None:
    check_no_leaks(dataset)


def test_a_target_that_is_trained_on_is_refused_by_user(dataset: PreparedDataset) -> None:
    for part in ("validation", "test"):
        with pytest.raises(UserError, match=f"{part} target of user u003"):
            check_no_leaks(forged(dataset, f"{part}_U", 3, int(dataset.train_length_U[3]) - 1))


def test_a_validation_that_comes_after_the_test_is_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(UserError, match="u002"):
        check_no_leaks(forged(dataset, "validation_U", 2, int(dataset.test_U[2])))


def test_popularity_that_counts_targets_is_refused(dataset: PreparedDataset) -> None:
    everything = np.bincount(dataset.item_rows_I, minlength=dataset.n_items)
    with pytest.raises(UserError, match="train_count"):
        check_no_leaks(replace(dataset, train_counts_N=everything))


def test_interactions_out_of_order_are_refused(dataset: PreparedDataset) -> None:
    shifted = np.array(dataset.starts_U)
    shifted[1] -= 1
    with pytest.raises(UserError, match=r"users\.parquet"):
        check_no_leaks(replace(dataset, starts_U=shifted))
    longer, lengths = np.array(dataset.lengths_U), np.array(dataset.lengths_U)
    longer[1], longer[2] = lengths[1] + 1, lengths[2] - 1  # user 1 ends with the oldest of user 2
    moved = replace(dataset, lengths_U=longer, starts_U=np.cumsum(longer, dtype=np.int64) - longer)
    places = np.concatenate([np.arange(length) for length in longer])
    training = places < np.repeat(moved.train_length_U, longer)
    counts_N = np.bincount(moved.item_rows_I[training], minlength=moved.n_items)
    with pytest.raises(UserError, match=r"user u001 .*time"):
        check_no_leaks(replace(moved, train_counts_N=counts_N))


@pytest.fixture(scope="module")
def temporal(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    split = {"kind": "temporal", "validation_share": 0.2, "test_share": 0.2}
    return prepared(tmp_path_factory.mktemp("temporal"), split=split)


def test_a_temporal_split_that_trains_or_asks_outside_its_windows_is_refused(temporal: PreparedDataset) -> None:
    check_no_leaks(temporal)
    first, second = temporal.manifest["cut_times"]
    for cuts, named in (
        ([first - 5 * 86_400, second], f"first cut, {first - 5 * 86_400}"),
        ([first, first + 1], "validation target of user u[0-9]+"),
        ([first, second + 20 * 86_400], "test target of user u[0-9]+"),
    ):
        with pytest.raises(UserError, match=named):
            check_no_leaks(replace(temporal, manifest={**temporal.manifest, "cut_times": cuts}))


@pytest.mark.slow
def test_the_order_of_items_ids_says_nothing(tmp_path):
    """In the public files of Amazon, purchases of one day stand in the order of their ids: no part may know that."""
    names = [f"i{item:03d}" for item in range(40)]
    others = dict(zip(names, np.random.default_rng(3).permutation(names).tolist(), strict=True))
    ranks = []
    for place in ("known", "renumbered"):
        config = make_world(tmp_path / place)
        log = pd.read_csv(tmp_path / place / "log" / "interactions.csv").assign(time=lambda rows: rows.time // 300_000)
        items = pd.read_csv(tmp_path / place / "log" / "items.csv")
        if place == "renumbered":
            log, items = (table.assign(item=table.item.map(others)) for table in (log, items))
        log.to_csv(tmp_path / place / "log" / "interactions.csv", index=False)  # with several purchases of one time
        items.sort_values("item").to_csv(tmp_path / place / "log" / "items.csv", index=False)
        run = open_run(config)
        run.run(["prepare", "neighbours"])
        dataset = run.dataset
        batch = EvalBatch.of(dataset, dataset.targets("test"))
        users = np.argsort(dataset.user_ids.take(batch.user_rows).to_pylist())
        rankers = {**run.neighbours, "popularity": VectorRanker.of_counts(dataset.train_counts_N)}
        ranks.append({name: ranks_U[users] for name, ranks_U in rank_users(batch, rankers).items()})
    for name, ranks_U in ranks[0].items():
        moved_U = np.abs(ranks_U - ranks[1][name])  # equal scores may round apart
        assert (moved_U > 0).mean() < 0.1, name
        assert moved_U.max() <= 2, name
