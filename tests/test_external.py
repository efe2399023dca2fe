"""Ranks and scores of another system, read from a file: small examples by hand, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rarec.errors import UserError
from rarec.evaluation.external import TargetUsers, external_ranks, read_external
from rarec.evaluation.labels import EXTERNAL
from rarec.evaluation.rows import pairs_of_interest
from rarec.ranking.rank import VectorScores, rank_scores
from tests.datasets import column_of

USERS = TargetUsers(
    user_ids=pa.array(["ann", "bob", "cat"]),
    item_ids=column_of(["a", "b", "c", "d", "e"]),
    targets_U=np.array([0, 1, 2]),
    seen=[np.array([4]), np.array([0, 0]), np.array([], int)],
)


def parquet(directory: Path, **columns: Any) -> Path:
    path = directory / "ranks.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_ranks_come_in_the_order_of_the_test_users(tmp_path):
    path = parquet(tmp_path, rank=[3, 9, 5, 1], user=["cat", "zoe", "ann", "bob"][:4], note=["", "", "", ""])
    with pytest.raises(UserError, match=r"row 2, column `rank`: 9"):
        read_external(path, USERS)
    found = read_external(parquet(tmp_path, rank=[3, 2, 5, 1], user=["cat", "zoe", "ann", "bob"]), USERS)
    assert found.ranks_U.tolist() == [5, 1, 3]
    assert found.notes == ["1 users are no test users: ignored"]


def test_scores_exclude_earlier_items_and_ties_count_against_the_system(tmp_path):
    """ann: e was seen, b ties: rank 2. bob: a was seen: rank 1. cat: c is not listed: rank 5. zoe is no test user."""
    rows = [
        ("ann", "a", 0.5), ("ann", "b", 0.5), ("ann", "c", 0.4), ("ann", "e", 0.9),
        ("bob", "a", 2.0), ("bob", "b", 1.0), ("bob", "x", 3.0),
        ("cat", "a", 0.1), ("zoe", "a", 0.1),
    ]  # fmt: skip
    user, item, score = (list(column) for column in zip(*rows, strict=True))
    found = read_external(parquet(tmp_path, user=user, item=item, score=score), USERS)
    assert found.ranks_U.tolist() == [2, 1, 5]
    assert [note.partition(":")[0] for note in found.notes] == [
        "1 test targets are not listed",
        "1 users are no test users",
        "1 items are not in the catalogue",
    ]


def test_scores_of_the_whole_catalogue_give_the_ranks_of_this_project(tmp_path):
    rng = np.random.default_rng(0)
    users_UD, items_ND = rng.integers(-2, 3, (30, 3)), rng.integers(-2, 3, (20, 3))
    seen, targets = [rng.integers(20, size=5) for _ in range(30)], rng.integers(20, size=30)
    ids = {"user_ids": pa.array(range(30)), "item_ids": column_of(range(100, 120))}
    columns = {"user": np.repeat(np.arange(30), 20), "item": np.tile(np.arange(100, 120), 30)}
    path = parquet(tmp_path, **columns, score=(users_UD @ items_ND.T).ravel())
    found = read_external(path, TargetUsers(**ids, targets_U=targets, seen=seen))
    expected = rank_scores(VectorScores(users_UD.astype(np.float32), items_ND.astype(np.float32)), targets, seen)
    assert found.ranks_U.tolist() == expected.tolist()
    assert found.notes == []


@pytest.mark.parametrize("ids", [["007", "08", "9"], [7, 8, 9]])
def test_ids_of_a_csv_file_are_taken_as_they_are_written(tmp_path, ids):
    path = tmp_path / "ranks.csv"
    path.write_text("user,rank\n" + "".join(f"{user},{rank}\n" for rank, user in enumerate(ids, 1)))
    users = TargetUsers(pa.array(ids), USERS.item_ids, USERS.targets_U, USERS.seen)
    assert read_external(path, users).ranks_U.tolist() == [1, 2, 3]


def test_every_file_becomes_a_row_and_what_was_ignored_is_printed(tmp_path):
    lines: list[str] = []
    path = parquet(tmp_path, user=["ann", "bob", "cat", "zoe"], rank=[1, 2, 3, 4])
    ranks = external_ranks({"llara": str(path)}, USERS, say=lines.append)
    assert {name: values.tolist() for name, values in ranks.items()} == {f"{EXTERNAL}llara": [1, 2, 3]}
    assert [line for line in lines if "ranks.parquet" in line and "1 users" in line] == lines != []


def test_ids_of_categories_are_read(tmp_path):
    user = pa.array(["ann", "bob", "cat"]).dictionary_encode()
    assert read_external(parquet(tmp_path, user=user, rank=[1.0, 2.0, 3.0]), USERS).ranks_U.tolist() == [1, 2, 3]


ANN = ["ann", "bob", "cat"]


@pytest.mark.parametrize(
    ("columns", "problem", "remedy"),
    [
        ({"user": ANN}, "columns user", "`user, rank` or `user, item, score`"),
        ({"user": ANN, "item": ["a"] * 3, "rank": [1, 2, 3]}, "columns user, item, rank", "not both"),
        ({"user": ANN, "rank": [1, 0, 2]}, "row 2, column `rank`: 0", "1 (best) to 5"),
        ({"user": ANN, "rank": [1.0, 1.5, 2.0]}, "row 2, column `rank`: 1.5", "whole number"),
        ({"user": ANN, "rank": [1, None, 2]}, "row 2, column `rank`", "number"),
        ({"user": ANN, "rank": ["1", "2", "3"]}, "column `rank` holds string", "numbers"),
        ({"user": ["ann", None, "cat"], "rank": [1, 2, 3]}, "row 2, column `user`", "id"),
        ({"user": [1.0, 2.0, 3.0], "rank": [1, 2, 3]}, "column `user` holds double", "text"),
        ({"user": ["ann", "bob", "cat", "ann"], "rank": [1, 2, 3, 1]}, "row 4: user 'ann'", "one row"),
        ({"user": ["ann"], "rank": [1]}, "column `user` lacks 2 of 3 test users, such as 'bob'", "ranks.parquet"),
        ({"user": ["ann"], "item": ["a"], "score": [1.0]}, "column `user` lacks 2 of 3", "ranks.parquet"),
        ({"user": ["ann", *ANN], "item": ["a"] * 4, "score": [1.0] * 4}, "row 2: user 'ann', item 'a'", "one row"),
        ({"user": ANN, "item": ["a"] * 3, "score": [1.0, np.nan, 1.0]}, "row 2, column `score`", "number"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_row_and_column(tmp_path, columns, problem, remedy):
    with pytest.raises(UserError) as caught:
        read_external(parquet(tmp_path, **columns), USERS)
    assert "ranks.parquet" in caught.value.problem
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy


def test_a_column_that_is_there_twice_is_named(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("user,user,rank\nann,ann,1\n")
    with pytest.raises(UserError, match=r"twice.csv.*`user`"):
        read_external(path, USERS)


def test_a_number_that_no_float_holds_exactly_is_read(tmp_path):
    """2^53 + 1 is no rank; as a score it is as good as its neighbour."""
    large = 2**53 + 1
    with pytest.raises(UserError, match=r"row 2, column `rank`"):
        read_external(parquet(tmp_path, user=ANN, rank=[1, large, 2]), USERS)
    scores = parquet(tmp_path, user=ANN, item=["a", "a", "a"], score=[large, 1, 2])
    assert len(read_external(scores, USERS).ranks_U) == 3


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.parquet").write_text("no")
    for name in ("broken.parquet", "absent.csv"):
        with pytest.raises(UserError, match=name):
            read_external(tmp_path / name, USERS)


def test_the_main_variant_and_its_fusion_are_compared_with_another_system():
    llara = f"{EXTERNAL}llara"
    pairs = pairs_of_interest(["id_only", "per_layer", "per_layer+id", llara], "per_layer")
    assert ("per_layer", llara) in pairs
    assert ("per_layer+id", llara) in pairs
    assert ("id_only", llara) not in pairs
    cheap = pairs_of_interest(["id_only+cheap", "per_layer+id+cheap", llara], "per_layer")
    assert {("id_only+cheap", llara), ("per_layer+id+cheap", llara)} <= set(cheap)
