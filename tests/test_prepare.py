"""Test the preparation: a table of twelve rows worked out by hand, then properties of random logs."""

import hashlib
import random
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from rarec.config.schema import Prepare
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.storage.directories import CHECKED
from tests.datasets import prepare_dataset, run_of
from tests.test_readers import FORMATS, write_table

LOG = [
    ("u1", "a", 10),
    ("u2", "b", 10),
    ("u1", "b", 20),
    ("u2", "a", 10),  # tie
    ("u1", "c", 30),
    ("u1", "a", 50),  # again
    ("u2", "c", 30),
    ("u1", "d", 40),
    ("u3", "b", 5),
    ("u3", "z", 6),  # not in the catalogue
    (None, "a", 7),  # nobody
    ("u3", "d", 8),  # leaves u3 with two
]
CATALOGUE = [
    ("a", " Red \n shoes", "Acme", "1999"),
    ("b", "Blue shoes", None, "2001"),
    ("c", None, "Acme", None),  # no title
    ("d", "Green hat", None, None),
    ("a", "Another", "x", "y"),  # again
    ("e", "Never met", None, None),
    (None, "No id", None, None),
]


def configure(folder: Path, log: str = "log.csv", items: str = "items.csv", **more: Any) -> Prepare:
    order = more.pop("order", "time")
    interactions = {"path": str(folder / log), "user": "user", "item": "item", order: "time"}
    catalogue = {"path": str(folder / items), "item": "item", "title": "title", "text": ["brand", "year"]}
    sections = {"interactions": interactions, "items": catalogue}
    return Prepare.model_validate({**sections, "min_user_interactions": 3, **more})


def write(folder: Path, log: list[Any] = LOG, items: list[Any] = CATALOGUE, suffix: str = "csv") -> None:
    write_table(folder / f"log.{suffix}", ["user", "item", "time"], log)
    write_table(folder / f"items.{suffix}", ["item", "title", "brand", "year"], items)


def make(folder: Path, told: list[str] | None = None, **more: Any) -> PreparedDataset:
    return prepare_dataset(
        configure(folder, **more), folder / "out", seed=1, say=(told if told is not None else []).append
    )


def ids(dataset: PreparedDataset) -> dict[Any, list[Any]]:
    """Every user's items, by the ids that people see."""
    items = list(dataset.item_ids)
    users = enumerate(list(dataset.user_ids))
    return {user: [items[row] for row in dataset.sequence(at)] for at, user in users}


def test_twelve_rows_by_hand(tmp_path: Path) -> None:
    write(tmp_path)
    told: list[str] = []
    dataset = make(tmp_path, told)
    # u2 met a and b at once: in the order of the rows
    assert ids(dataset) == {"u1": ["a", "b", "c", "d"], "u2": ["b", "a", "c"]}
    assert list(dataset.item_ids) == ["a", "b", "c", "d", "e"]
    assert list(dataset.titles) == ["Red shoes", "Blue shoes", "untitled item", "Green hat", "Never met"]
    assert list(dataset.texts) == ["Acme, 1999", "2001", "Acme", "", ""]
    assert (dataset.train_length_U.tolist(), dataset.validation_U.tolist()) == ([2, 1], [2, 1])
    assert dataset.test_U.tolist() == [3, 2]
    assert dataset.train_counts_N.tolist() == [1, 2, 0, 0, 0]
    manifest = dataset.manifest
    counts = {"users": 2, "items": 5, "interactions": 7, "training_samples": 1, "validation_users": 2, "test_users": 2}
    assert manifest["counts"] == counts
    assert manifest["catalogue"] == {"rows": 7, "rows_without_id": 1, "repeated_ids": 1, "untitled": 1}
    seen = [(s["step"], s["interactions_before"], s["interactions_after"], s["users_after"]) for s in manifest["steps"]]
    assert seen == [
        ("ids", 12, 11, 3),
        ("order", 11, 11, 3),
        ("catalogue", 11, 10, 3),
        ("duplicates", 10, 10, 3),
        ("repeats", 10, 9, 3),
        ("min_user_interactions", 9, 7, 2),
    ]
    text = "\n".join(told)
    for part in ("1 rows without an item id", "1 rows repeat", "1 items have no title", "2 interactions, 1 users"):
        assert part in text
    assert "order of the log's rows" in manifest["tie_rule"]
    assert pq.read_table(dataset.directory / "items.parquet")["cold"].to_pylist() == [False, False, True, True, True]


def test_the_files_say_what_the_arrays_say(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = make(tmp_path)
    users, interactions = (pq.read_table(dataset.directory / f"{name}.parquet") for name in ("users", "interactions"))
    assert users.to_pylist()[1] == {
        "row": 1, "user_id": "u2", "start": 4, "length": 3, "train_length": 1, "validation": 1, "test": 2,
        "cold": True,
    }  # fmt: skip
    assert interactions["time"].to_pylist() == [10, 20, 30, 40, 10, 10, 30]
    assert interactions["user_row"].to_pylist() == [0] * 4 + [1] * 3


@pytest.mark.slow
def test_every_format_gives_the_same_files(tmp_path: Path) -> None:
    items = [row for row in CATALOGUE if row[0] != "a"] + [
        ("a", "Red shoes", "Acme", "1999")
    ]  # RecBole has no newlines
    files = []
    for suffix in FORMATS:
        write(tmp_path, LOG, items, suffix)
        files.append(make(tmp_path, log=f"log.{suffix}", items=f"items.{suffix}").manifest["files"])
    assert files == files[:1] * len(FORMATS)


@pytest.mark.parametrize(
    ("policy", "of_u1"), [("first", "abcde"), ("last", "bcdae"), ("runs", "abcdae"), ("keep", "abcddae")]
)
def test_repeats(tmp_path: Path, policy: str, of_u1: str) -> None:
    write(tmp_path, [*LOG, ("u1", "d", 45), ("u1", "e", 60)])
    assert ids(make(tmp_path, repeats=policy))["u1"] == list(of_u1)


@pytest.mark.parametrize(("policy", "of_u1"), [("drop", "abcda"), ("keep", "abbcda")])
def test_duplicates(tmp_path: Path, policy: str, of_u1: str) -> None:
    write(tmp_path, [*LOG, ("u1", "b", 20)])
    assert ids(make(tmp_path, duplicates=policy, repeats="keep"))["u1"] == list(of_u1)


def test_integer_ids_stay_integers_sort_as_numbers_and_match_whatever_their_types(tmp_path: Path) -> None:
    log = [(user, item, item) for user in (10, 9) for item in (3, 20, 100, 500)]
    write_table(tmp_path / "log.parquet", ["user", "item", "time"], log)
    write_table(tmp_path / "log.csv", ["user", "item", "time"], log)
    write_table(tmp_path / "log.jsonl", ["user", "item", "time"], [(user, str(item), time) for user, item, time in log])
    write_table(
        tmp_path / "items.csv", ["item", "title", "brand", "year"], [(i, "t", "", "") for i in (500, 100, 20, 3)]
    )
    for suffix in ("parquet", "csv", "jsonl"):
        dataset = make(tmp_path, log=f"log.{suffix}")
        assert list(dataset.user_ids) == [9, 10]
        assert list(dataset.item_ids) == [3, 20, 100, 500]
        assert ids(dataset) == {9: [3, 20, 100, 500], 10: [3, 20, 100, 500]}


def test_one_item_id_that_is_no_integer_makes_them_all_text_and_zeros_are_kept(tmp_path: Path) -> None:
    names = ["007", "7", "8", "10"]
    log, items = [("u", name, at) for at, name in enumerate(names)], [(name, "t", "", "") for name in names]
    write(tmp_path, log, items)
    dataset = make(tmp_path)
    assert ids(dataset) == {"u": names}
    assert list(dataset.item_ids) == ["007", "10", "7", "8"]


@pytest.mark.parametrize(
    "times",
    [
        [1_700_000_000, 1_700_000_001, 1_700_000_002.5, 1_700_000_003],
        [1_700_000_000_000, 1_700_000_001_000, 1_700_000_002_500, 1_700_000_003_000],
        [1_700_000_000_000_000, 1_700_000_001_000_000, 1_700_000_002_500_000, 1_700_000_003_000_000],
        ["2023-11-14T22:13:20Z", "2023-11-14 22:13:21", "2023-11-15T00:13:22.5+02:00", "2023-11-14T22:13:23"],
        ["1700000000", "+1700000001", "1.7000000025e9", "1700000003."],
    ],
)
def test_times(tmp_path: Path, times: list[Any]) -> None:
    log = [("u", item, time) for item, time in zip("abde", times, strict=True)]
    for suffix in ("csv", "jsonl"):
        write(tmp_path, log[::-1], CATALOGUE, suffix)
        dataset = make(tmp_path, log=f"log.{suffix}", items=f"items.{suffix}")
        assert ids(dataset) == {"u": ["a", "b", "d", "e"]}
        written = pq.read_table(dataset.directory / "interactions.parquet")["time"].to_pylist()
        assert written == [1_700_000_000, 1_700_000_001, 1_700_000_002.5, 1_700_000_003]


def test_timestamps_of_parquet(tmp_path: Path) -> None:
    moments = [datetime(2023, 11, 14, 22, 13, second, 250_000, tzinfo=UTC) for second in (20, 21, 22, 23)]
    write(tmp_path, [("u", item, moment) for item, moment in zip("dbae", moments, strict=True)], suffix="parquet")
    dataset = make(tmp_path, log="log.parquet", items="items.parquet")
    assert ids(dataset) == {"u": ["d", "b", "a", "e"]}
    written = pq.read_table(dataset.directory / "interactions.parquet")["time"].to_pylist()
    assert written == [moment.timestamp() for moment in moments]


def test_positions_stand_for_times(tmp_path: Path) -> None:
    write(tmp_path, [("u", "a", 3), ("u", "b", 10), ("u", "d", 1), ("u", "e", 20)])
    dataset = make(tmp_path, order="position")
    assert ids(dataset) == {"u": ["d", "a", "b", "e"]}
    assert pq.read_table(dataset.directory / "interactions.parquet").column_names == [
        "user_row",
        "item_row",
        "position",
    ]


def test_k_core_goes_on_until_nothing_changes(tmp_path: Path) -> None:
    log = [(user, item, at) for user in ("u1", "u2", "u4") for at, item in enumerate("abef")]
    # g is met once; without it u3 has two; without u3, c is met once
    log += [("u1", "c", 9), ("u3", "c", 1), ("u3", "a", 2), ("u3", "g", 3)]
    write(tmp_path, log, [(name, name, "", "") for name in "abcdefg"])
    dataset = make(tmp_path, min_item_interactions=2)
    assert list(dataset.item_ids) == ["a", "b", "e", "f"]
    assert ids(dataset) == {user: ["a", "b", "e", "f"] for user in ("u1", "u2", "u4")}
    rounds = [(step["step"], step["interactions_after"]) for step in dataset.manifest["steps"][5:]]
    item, user = "min_item_interactions", "min_user_interactions"
    assert rounds == [(item, 15), (user, 13), (item, 12)]
    assert len(make(tmp_path).item_ids) == 7, "without a minimum the whole catalogue stays"


def test_users_with_fewer_than_three_interactions_train_only(tmp_path: Path) -> None:
    log = [("u1", item, at) for at, item in enumerate("abcd")] + [("u2", "a", 0), ("u2", "b", 1), ("u3", "d", 1)]
    write(tmp_path, log)
    dataset = make(tmp_path, min_user_interactions=1)
    assert dataset.train_length_U.tolist() == [2, 2, 1]
    assert dataset.validation_U.tolist() == [2, -1, -1]
    assert dataset.test_U.tolist() == [3, -1, -1]


def test_the_temporal_split_by_hand(tmp_path: Path) -> None:
    # twenty rows at times 0..19: shares of 0.2 cut at times 12 and 16
    times = {"u1": [0, 1, 2, 12, 13, 16, 17], "u2": [3, 4, 5, 6, 7, 8, 9, 10, 11, 15], "u3": [14, 18, 19]}
    log = [(user, f"i{time}", time) for user, own in times.items() for time in own]
    write(tmp_path, log, [(f"i{time}", "t", "", "") for time in range(20)])
    dataset = make(tmp_path, split={"kind": "temporal", "validation_share": 0.2, "test_share": 0.2})
    assert dataset.manifest["cut_times"] == [12, 16]
    assert dataset.train_length_U.tolist() == [3, 9, 0]
    assert dataset.validation_U.tolist() == [3, 9, -1], "u3's 14 has nothing before it"
    assert dataset.test_U.tolist() == [5, -1, 1]


def test_the_same_input_gives_the_same_artefact_and_a_stage_can_ask_whether_it_is_current(tmp_path: Path) -> None:
    write(tmp_path)
    config = configure(tmp_path)
    first = make(tmp_path).hash
    there = (tmp_path / "out" / "prepare").rglob("*")
    written = [path for path in there if path.is_file() and path.name != CHECKED]
    bytes_of = {path: path.read_bytes() for path in written}
    assert make(tmp_path).hash == first
    assert {path: path.read_bytes() for path in written} == bytes_of
    stage = run_of(config, tmp_path / "out", seed=1).stage("prepare")
    assert not stage.make()
    write(tmp_path, LOG[:-1])
    with pytest.raises(UserError, match="interactions"):
        stage.make()


def refuse(folder: Path, *parts: str, **more: Any) -> None:
    with pytest.raises(UserError) as caught:
        make(folder, **more)
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))
    assert not [path for path in (folder / "out").rglob("*") if "prepare" in path.name and path.suffix != ".lock"]


@pytest.mark.parametrize("bad", [None, "yesterday", "nan", "inf", "2024-13-01"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_time_that_is_none_names_the_row(tmp_path: Path, bad: Any, suffix: str) -> None:
    write(tmp_path, [("u", "a", "1"), ("u", "b", bad), ("v", "d", bad), ("u", "d", "3")], CATALOGUE, suffix)
    said = "missing" if bad is None else repr(bad)
    where = f"log.{suffix}, data row 2 (user 'u', item 'b')"
    more = {"log": f"log.{suffix}", "items": f"items.{suffix}"}
    refuse(tmp_path, where, said, "; 2 ", "prepare.interactions.time", **more)
    refuse(tmp_path, "prepare.interactions.position", order="position", **more)


@pytest.mark.slow
def test_what_leaves_nothing_says_which_step_and_what_to_do(tmp_path: Path) -> None:
    write(tmp_path)
    refuse(tmp_path, "log.csv", "step min_user_interactions", "prepare.min_user", min_user_interactions=9)
    refuse(tmp_path, "step min_item_interactions", "prepare.min_item", min_item_interactions=9)
    nothing_tests = {"kind": "temporal", "validation_share": 0.9, "test_share": 0.05}
    refuse(tmp_path, "log.csv", "training samples", "prepare.split", split=nothing_tests)
    write(tmp_path, [("u", f"I{row}", row) for row in range(5)])
    refuse(tmp_path, "step catalogue", "'I0' to 'I4'", "'a' to 'e'")
    write(tmp_path, [(None, "a", 1), ("", "b", 1)])
    refuse(tmp_path, "step ids", "'user' and 'item'")
    write(tmp_path, LOG, [(None, "x", "", "")])
    refuse(tmp_path, "items.csv", "'item'", "prepare.items.item")


def test_a_header_between_the_rows_of_a_catalogue_is_no_item(tmp_path: Path) -> None:
    write(tmp_path, LOG, [CATALOGUE[0], ("item", "title", "brand", "year"), *CATALOGUE[1:]])
    refuse(tmp_path, "items.csv", "data row 2", "header", "items-*.csv")


def test_a_temporal_split_needs_time_and_something_before_the_windows(tmp_path: Path) -> None:
    write(tmp_path)
    refuse(tmp_path, "prepare.split.kind", "time", order="position", split={"kind": "temporal"})
    shares = {"kind": "temporal", "validation_share": 0.5, "test_share": 0.5}
    refuse(tmp_path, "prepare.split", "below 1", split=shares)


def test_an_error_leaves_the_earlier_dataset_as_it_was(tmp_path: Path) -> None:
    write(tmp_path)
    first = make(tmp_path).hash
    with pytest.raises(UserError):
        make(tmp_path, min_user_interactions=9)
    assert PreparedDataset.open(tmp_path / "out" / "prepare").hash == first


SEEDS = st.integers(0, 2**32)
FEW = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def any_log(seed: int) -> list[Any]:
    """Up to six users, eight items and sixteen moments, so ties and repeats abound."""
    rng = random.Random(seed)
    return [(rng.randrange(6), rng.randrange(8), rng.randrange(16)) for _ in range(rng.randint(20, 60))]


def prepared(factory: pytest.TempPathFactory, log: list[Any], **more: Any) -> PreparedDataset:
    """The dataset of any log with some part for everything; the few others are refused, and passed over here."""
    folder = factory.mktemp("any")
    write(folder, log, [(number, f"t{number}", "", "") for number in range(8)])
    try:
        return make(folder, **{"min_user_interactions": 1, **more})
    except UserError as error:
        if "the split leaves no" not in error.problem:
            raise
        reject()


def order_of(dataset: PreparedDataset) -> np.ndarray[Any, np.dtype[np.float64]]:
    times: np.ndarray[Any, np.dtype[np.float64]] = pq.read_table(dataset.directory / "interactions.parquet")[
        "time"
    ].to_numpy()
    return times


@pytest.mark.slow
@FEW
@given(seed=SEEDS, shares=st.tuples(st.sampled_from([0.1, 0.3]), st.sampled_from([0.1, 0.3])))
def test_a_temporal_split_never_trains_on_what_comes_after_a_target(
    tmp_path_factory: pytest.TempPathFactory, seed: int, shares: tuple[float, float]
) -> None:
    chosen = {"kind": "temporal", "validation_share": shares[0], "test_share": shares[1]}
    dataset = prepared(tmp_path_factory, any_log(seed), split=chosen, duplicates="keep", repeats="keep")
    times, users = order_of(dataset), range(dataset.n_users)
    trained = [times[dataset.starts_U[u] : dataset.starts_U[u] + dataset.train_length_U[u]] for u in users]
    latest = max((own.max() for own in trained if len(own)), default=-1)
    tests, validations = dataset.targets("test"), dataset.targets("validation")
    test_times, validation_times = (times[dataset.starts_U[t.user_rows] + t.positions] for t in (tests, validations))
    assert latest < validation_times.min(initial=99)
    assert validation_times.max(initial=-1) < test_times.min(initial=99)
    assert (tests.positions >= 1).all()
    assert (validations.positions >= 1).all()
    for part, mine in (
        (validations, validation_times),
        (tests, test_times),
    ):  # the first in its window that has a history
        earlier = part.positions > 1
        before = times[dataset.starts_U[part.user_rows[earlier]] + part.positions[earlier] - 1]
        assert (before < dataset.manifest["cut_times"][0 if part is validations else 1]).all()
        assert (before <= mine[earlier]).all()


def shuffled(log: list[Any], seed: int) -> list[Any]:
    """The rows in another order, but those of a user and time in their own."""
    tied: dict[Any, list[Any]] = {}
    for row in log:
        tied.setdefault((row[0], row[2]), []).append(row)
    rest = {key: iter(rows) for key, rows in tied.items()}
    return [next(rest[user, time]) for user, _, time in random.Random(seed).sample(log, len(log))]


def sequences_of(log: list[Any], repeats: str) -> dict[Any, list[Any]]:
    """Every user's items by a stable sort, and the stated rules."""
    rows = sorted(dict.fromkeys(log), key=lambda row: row[2])
    users = {user: [item for who, item, _ in rows if who == user] for user in sorted({row[0] for row in rows})}
    kept = {
        "first": lambda items: list(dict.fromkeys(items)),
        "last": lambda items: list(dict.fromkeys(items[::-1]))[::-1],
        "runs": lambda items: [item for item, _ in groupby(items)],
        "keep": list,
    }
    return {user: kept[repeats](items) for user, items in users.items()}


@pytest.mark.slow
@FEW
@given(seed=SEEDS, repeats=st.sampled_from(["first", "last", "runs", "keep"]))
def test_leave_one_out_never_leaks_and_the_order_of_rows_matters_in_ties_alone(
    tmp_path_factory: pytest.TempPathFactory, seed: int, repeats: str
) -> None:
    log = any_log(seed)
    dataset = prepared(tmp_path_factory, log, repeats=repeats)
    assert ids(dataset) == sequences_of(log, repeats)
    again = prepared(tmp_path_factory, shuffled(log, seed), repeats=repeats)
    assert again.manifest["files"] == dataset.manifest["files"]
    users, positions = dataset.training_samples()
    for user in range(dataset.n_users):
        length, mine = len(dataset.sequence(user)), positions[users == user]
        assert mine.tolist() == list(range(1, max(length - 2, 1) if length >= 3 else length))
        expected = (length - 2, length - 1) if length >= 3 else (-1, -1)
        assert (dataset.validation_U[user], dataset.test_U[user]) == expected
        start = dataset.starts_U[user]
        assert (np.diff(order_of(dataset)[start : start + length]) >= 0).all()
    trained = [dataset.sequence(user)[: dataset.train_length_U[user]] for user in range(dataset.n_users)]
    counted = np.bincount(np.concatenate(trained), minlength=dataset.n_items)
    assert dataset.train_counts_N.tolist() == counted.tolist()
    distinct = len(set(log) if repeats in ("keep", "runs") else {row[:2] for row in log})
    assert len(dataset.item_rows_I) == distinct or (repeats == "runs" and len(dataset.item_rows_I) < distinct)


@pytest.mark.slow
@FEW
@given(seed=SEEDS, validating=st.integers(1, 12))
def test_users_who_do_not_validate_train_on_all_but_their_last(
    tmp_path_factory: pytest.TempPathFactory, seed: int, validating: int
) -> None:
    log = any_log(seed)
    every = prepared(tmp_path_factory, log)
    some = prepared(tmp_path_factory, log, split={"validation_users": validating})
    validates = some.validation_U >= 0
    eligible = every.validation_U >= 0
    assert validates.sum() == min(validating, eligible.sum())
    assert not (validates & ~eligible).any()
    assert some.test_U.tolist() == every.test_U.tolist()
    assert some.validation_U[validates].tolist() == every.validation_U[validates].tolist()
    assert (some.train_length_U - every.train_length_U).tolist() == (eligible & ~validates).astype(int).tolist()


@pytest.mark.slow
@FEW
@given(seed=SEEDS, share=st.sampled_from([0.2, 0.5]))
def test_new_items_are_met_as_a_users_last_alone(
    tmp_path_factory: pytest.TempPathFactory, seed: int, share: float
) -> None:
    """Every user's last stays, and of the rest all that is not new, in its order; no engine is asked for a seed."""
    chosen = {"split": {"new_items": share}, "min_user_interactions": 3}
    every = ids(prepared(tmp_path_factory, any_log(seed), min_user_interactions=3))
    dataset = prepared(tmp_path_factory, any_log(seed), **chosen)
    digests = {item: int(hashlib.md5(f"new item {item}".encode()).hexdigest()[:7], 16) for item in range(8)}
    new = {item for item, digest in digests.items() if digest < share * 16**7}
    expected = {user: [item for item in seen[:-1] if item not in new] + seen[-1:] for user, seen in every.items()}
    assert ids(dataset) == {user: seen for user, seen in expected.items() if len(seen) >= 3}
    assert not dataset.train_counts_N[sorted(new)].any()


@pytest.mark.parametrize(
    ("split", "least", "said"),
    [
        ({"new_items": 0.1}, 2, "prepare.min_user_interactions"),
        ({"new_items": 0.1, "kind": "temporal"}, 3, "prepare.split.new_items"),
    ],
)
def test_new_items_need_a_last_interaction_apart(tmp_path: Path, split: dict[str, Any], least: int, said: str) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=said):
        make(tmp_path, split=split, min_user_interactions=least)
