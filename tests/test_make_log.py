"""The synthetic log generator: it has the rows of its settings, and the next item can be predicted."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from rarec.storage.directories import MARKER
from tools import make_log as module
from tools.make_log import Log, make_log

SMALL = {"users": 2_000, "items": 400, "interactions": 20_000}
MIDDLE = {"users": 30_000, "items": 5_000, "interactions": 300_000}
JUNK = {"nulls": 0.01, "unknown": 0.02, "duplicates": 0.03}


def made(directory: Path, **settings: Any) -> pd.DataFrame:
    make_log(directory, **settings)
    return pd.read_parquet(directory / "interactions")


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_order(log: pd.DataFrame) -> pd.DataFrame:
    return log.sort_values(["user", "time", "item"], ignore_index=True)


def same_as_before(log: pd.DataFrame, *columns: str) -> pd.Series:
    """Return whether each row has the same values in these columns as the row before."""
    return (log[list(columns)] == log[list(columns)].shift()).all(axis=1)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_log(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_log(tmp_path / name, **SMALL, **JUNK, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert set(digests(tmp_path / "a").values()).isdisjoint(digests(tmp_path / "c").values())


def test_counts_are_exact_over_several_blocks_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 1_000)
    log = made(tmp_path, **SMALL, **JUNK, fewest=4)
    assert sorted(path.name for path in (tmp_path / "interactions").glob("[!.]*")) == [
        f"part-{part:05d}.parquet" for part in range(3)
    ]
    assert len(log) == 20_000
    assert log[["user", "item"]].isna().any(axis=1).sum() == 200
    assert log.duplicated().sum() == 600
    assert (log["item"] > 400).sum() == 400
    assert log.user.isna().any()
    assert log["item"].isna().any()
    clean = made(tmp_path, **SMALL, fewest=4)
    lengths = clean.groupby("user").size()
    assert (len(clean), len(lengths), lengths.min()) == (20_000, 2_000, 4)
    assert lengths.quantile(0.99) > 3 * lengths.median(), "a long tail"
    assert not clean.duplicated().any()
    assert not clean.isna().any(axis=None)


def test_users_ids_do_not_rise_with_the_rows_and_times_do(tmp_path: Path) -> None:
    log = made(tmp_path, **SMALL, ties=0.3)
    users = log.user.drop_duplicates()
    assert not users.is_monotonic_increasing
    within = same_as_before(log, "user")
    assert within.sum() == len(log) - len(users), "a user's rows stand together"
    assert (log.time.diff()[within] >= 0).all()


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_ties_are_as_many_as_asked_for(tmp_path: Path, ties: float) -> None:
    log = made(tmp_path, **SMALL, ties=ties)
    tied = same_as_before(log, "user", "time").sum() / same_as_before(log, "user").sum()
    assert tied == pytest.approx(ties, abs=0.01)
    assert not log.duplicated(["user", "item", "time"]).any()


def test_shuffled_rows_are_the_same_log(tmp_path: Path) -> None:
    plain = made(tmp_path / "plain", **SMALL, **JUNK)
    shuffled = made(tmp_path / "shuffled", **SMALL, **JUNK, shuffled=True)
    assert same_as_before(plain, "user").mean() > 0.8 > 0.1 > same_as_before(shuffled, "user").mean()
    pd.testing.assert_frame_equal(in_order(plain), in_order(shuffled))


def test_popularity_follows_zipf(tmp_path: Path) -> None:
    counts = made(tmp_path, **MIDDLE, follow=0.0)["item"].value_counts().to_numpy()
    ranks = np.arange(1, len(counts) + 1)
    middle = slice(50, 1_500)
    slope = np.polyfit(np.log(ranks[middle]), np.log(counts[middle]), 1)[0]
    assert slope == pytest.approx(-1, abs=0.15)


def test_popularity_keeps_its_long_tail_where_items_follow_one_another(tmp_path: Path) -> None:
    counts = made(tmp_path, **MIDDLE)["item"].value_counts().to_numpy()
    assert 0.3 < counts[:250].sum() / counts.sum() < 0.8, "the top 5% of the items"


def test_the_item_before_and_the_title_tell_more_of_the_next_item_than_popularity(tmp_path: Path) -> None:
    log = made(tmp_path, **MIDDLE)
    last = log.groupby("user").tail(1)
    train = log.drop(last.index)
    popular = train["item"].value_counts().index[:10]
    by_popularity = last["item"].isin(popular).mean()
    assert by_popularity > 3 * 10 / 5_000
    steps = pd.DataFrame({"before": train["item"].shift(), "next": train["item"]})[same_as_before(train, "user")]
    ranked = steps.value_counts().reset_index().groupby("before").head(10)
    before = train.groupby("user").tail(1).set_index("user")["item"]
    wanted = pd.DataFrame({"before": last.user.map(before), "next": last["item"]})
    assert len(wanted.merge(ranked, on=["before", "next"])) / len(wanted) > 2.5 * by_popularity
    items = pd.read_parquet(tmp_path / "items.parquet").set_index("item")
    assert same_taste(log, items.title.str.split().str[0]) > 3 / 16, "a title's first word names the taste"
    assert same_taste(log, items.brand) > 3 / 16


def same_taste(log: pd.DataFrame, words: pd.Series) -> float:
    """Return the share of items that have the same word as the item before."""
    return float(same_as_before(log.assign(word=log["item"].map(words)), "word")[same_as_before(log, "user")].mean())


def test_the_catalogue_has_every_item_once_and_titles_that_differ(tmp_path: Path) -> None:
    make_log(tmp_path, users=10, items=3_000, interactions=50, tastes=256)
    items = pq.read_table(tmp_path / "items.parquet").to_pandas()
    assert items["item"].tolist() == list(range(1, 3_001))
    assert items.title.is_unique
    tastes = items.title.str.split().str[:2].str.join(" ")
    assert tastes.value_counts().between(11, 12).all()
    assert tastes.nunique() == 256


@pytest.mark.slow
def test_memory_does_not_grow_with_the_interactions(tmp_path: Path) -> None:
    peaks = []
    for interactions in (1_500_000, 4_500_000):
        code = (
            "from pathlib import Path; from rarec.distributed.hardware import peak_memory\n"
            "from tools.make_log import make_log\n"
            f"make_log(Path({str(tmp_path)!r}), users={interactions // 10}, interactions={interactions})\n"
            "print(peak_memory())"
        )
        root = Path(__file__).parent.parent
        ran = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
        peaks.append(int(ran.stdout))
    assert peaks[1] < peaks[0] + 30e6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"users": 10, "interactions": 49}, "interactions"),
        ({"users": 10, "interactions": 50, "duplicates": 0.1}, "interactions"),
        ({"items": 31}, "tastes"),
        ({"tastes": 257}, "tastes"),
        ({"users": 1, "nulls": 0.5, "duplicates": 0.3}, "duplicates"),
    ],
)
def test_what_cannot_be_made_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Log(**settings)


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    command = [sys.executable, Path(__file__).parent.parent / "tools" / "make_log.py", tmp_path]
    more = ["--users", "100", "--items", "50", "--interactions", "2000", "--nulls", "0.01"]
    ran = subprocess.run([*command, *more], check=True, capture_output=True, text=True)
    assert "100 users, 50 items, 2,000 interactions" in ran.stdout
    assert "20 nulls" in ran.stdout
    assert pq.read_table(tmp_path / "interactions").num_rows == 2_000
    wrong = subprocess.run([*command, "--users", "1000000"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "1,000,000 users" in wrong.stderr
