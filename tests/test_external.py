"""Ranks and scores of another system, read from a file: small examples by hand, and what is refused."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rarec.errors import UserError
from rarec.evaluation.external import external_ranks
from rarec.evaluation.results import EXTERNAL
from rarec.evaluation.rows import pairs_of_interest
from rarec.ranking.rank import EvalBatch, VectorScores, rank_scores
from tests.datasets import column_of

BATCH = EvalBatch(np.arange(3), [np.array([4]), np.array([0, 0]), np.array([], int)], np.array([0, 1, 2]))


ANN = ["ann", "bob", "cat"]


def parquet(directory: Path, **columns: Any) -> Path:
    path = directory / "ranks.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def read(
    path: Path, batch: EvalBatch = BATCH, users: Sequence[int | str] = ANN, items: Sequence[int | str] = "abcde"
) -> tuple[list[int], list[str]]:
    """Return the ranks of a file, and what is printed about it."""
    lines: list[str] = []
    dataset = SimpleNamespace(user_ids=column_of(users), item_ids=column_of(items))
    ranks = external_ranks({"llara": str(path)}, dataset, batch, lines.append)
    return ranks[f"{EXTERNAL}llara"].tolist(), lines


def test_ranks_come_in_the_order_of_the_test_users(tmp_path):
    path = parquet(tmp_path, rank=[3, 9, 5, 1], user=["cat", "zoe", "ann", "bob"][:4], note=["", "", "", ""])
    with pytest.raises(UserError, match=r"row 2, column `rank`: 9"):
        read(path)
    path = parquet(tmp_path, rank=[3, 2, 5, 1], user=["cat", "zoe", "ann", "bob"])
    assert read(path) == ([5, 1, 3], [f"{path}: 1 users are no test users: ignored"])


SEVERAL = EvalBatch(np.array([0, 0, 1]), [np.array([4]), np.array([4, 0]), np.array([1])], np.array([0, 1, 1]), False)


def test_the_questions_of_one_user_are_told_apart_by_their_place(tmp_path):
    """ann has two questions: scores of each have their own target, and no seen item is left out."""
    path = parquet(tmp_path, user=["ann", "bob", "ann"], place=[2, 1, 1], rank=[4, 2, 3])
    assert read(path, SEVERAL)[0] == [3, 4, 2]
    score = {"user": ["ann", "ann", "ann", "bob"], "place": [1, 1, 2, 1], "item": ["e", "a", "b", "b"]}
    assert read(parquet(tmp_path, **score, score=[2.0, 1.0, 1.0, 1.0]), SEVERAL)[0] == [2, 1, 1]
    for place, problem in (([1, 3], "row 2, column `place`: 3"), ([0, 1], "row 1, column `place`: 0")):
        with pytest.raises(UserError, match=problem):
            read(parquet(tmp_path, user=["ann", "ann"], place=place, rank=[1, 1]), SEVERAL)
    with pytest.raises(UserError) as caught:
        read(parquet(tmp_path, user=["ann", "bob"], rank=[1, 1]), SEVERAL)
    assert "'ann', place 2" in caught.value.problem
    assert "`place`" in caught.value.remedy


def test_scores_exclude_earlier_items_and_ties_count_against_the_system(tmp_path):
    """ann: e was seen, b ties: rank 2. bob: a was seen: rank 1. cat: c is not listed: rank 5. zoe is no test user."""
    rows = [
        ("ann", "a", 0.5), ("ann", "b", 0.5), ("ann", "c", 0.4), ("ann", "e", 0.9),
        ("bob", "a", 2.0), ("bob", "b", 1.0), ("bob", "x", 3.0),
        ("cat", "a", 0.1), ("zoe", "a", 0.1),
    ]  # fmt: skip
    user, item, score = (list(column) for column in zip(*rows, strict=True))
    ranks, lines = read(parquet(tmp_path, user=user, item=item, score=score))
    assert ranks == [2, 1, 5]
    assert [line.split(": ")[1] for line in lines] == [
        "1 users are no test users",
        "1 items are not in the catalogue",
        "1 test targets are not listed",
    ]


def test_scores_of_the_whole_catalogue_give_the_ranks_of_this_project(tmp_path):
    rng = np.random.default_rng(0)
    users_UD, items_ND = rng.integers(-2, 3, (30, 3)), rng.integers(-2, 3, (20, 3))
    seen, targets = [rng.integers(20, size=5) for _ in range(30)], rng.integers(20, size=30)
    columns = {"user": np.repeat(np.arange(30), 20), "item": np.tile(np.arange(100, 120), 30)}
    path = parquet(tmp_path, **columns, score=(users_UD @ items_ND.T).ravel())
    expected = rank_scores(VectorScores(users_UD.astype(np.float32), items_ND.astype(np.float32)), targets, seen)
    batch = EvalBatch(np.arange(30), seen, targets)
    assert read(path, batch, range(30), range(100, 120)) == (expected.tolist(), [])


@pytest.mark.parametrize("ids", [["007", "08", "9"], [7, 8, 9]])
def test_ids_of_a_csv_file_are_taken_as_they_are_written(tmp_path, ids):
    path = tmp_path / "ranks.csv"
    path.write_text("user,rank\n" + "".join(f"{user},{rank}\n" for rank, user in enumerate(ids, 1)))
    assert read(path, users=ids) == ([1, 2, 3], [])


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.string()), pa.large_string()])
def test_ids_of_categories_and_of_long_columns_are_read(tmp_path, kind):
    assert read(parquet(tmp_path, user=pa.array(ANN).cast(kind), rank=[1.0, 2.0, 3.0])) == ([1, 2, 3], [])


@pytest.mark.parametrize(
    ("columns", "problem", "remedy"),
    [
        ({"user": ANN}, "columns user", "`user, rank` or `user, item, score`"),
        ({"user": ANN, "item": ["a"] * 3, "rank": [1, 2, 3]}, "columns user, item, rank", "not both"),
        ({"user": ANN, "rank": [1, 0, 2]}, "row 2, column `rank`: 0", "1 (best) to 5"),
        ({"user": ANN, "rank": [1.0, 1.5, 2.0]}, "row 2, column `rank`: 1.5", "whole number"),
        ({"user": ANN, "rank": [1, None, 2]}, "row 2, column `rank`", "give one"),
        ({"user": ANN, "rank": ["1", "2", "3"]}, "column `rank` holds string", "numbers"),
        ({"user": ANN, "rank": [True, True, True]}, "column `rank` holds bool", "numbers"),
        ({"user": [1.0, 2.0, 3.0], "rank": [1, 2, 3]}, "column `user` holds double", "text"),
        ({"user": ["ann", None, "cat"], "rank": [1, 2, 3]}, "row 2, column `user`", "id"),
        ({"user": ANN, "user ": ANN, "rank": [[1], [2], [3]]}, "column `rank` holds list", "numbers"),
        ({"user": ["ann", "bob", "cat", "ann"], "rank": [1, 2, 3, 1]}, "row 4, column `user`: 'ann'", "one row"),
        ({"user": ["ann"], "rank": [1]}, "lacks 2 of 3 questions, such as that of user 'bob'", "ranks.parquet"),
        ({"user": ["ann"], "item": ["a"], "score": [1.0]}, "lacks 2 of 3", "ranks.parquet"),
        ({"user": ["ann", *ANN], "item": ["a"] * 4, "score": [1.0] * 4}, "row 2, column `item`: 'a'", "one row"),
        ({"user": ANN, "item": ["a"] * 3, "score": [1.0, np.nan, 1.0]}, "row 2, column `score`", "give one"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_row_and_column(tmp_path, columns, problem, remedy):
    with pytest.raises(UserError) as caught:
        read(parquet(tmp_path, **columns))
    assert "ranks.parquet" in caught.value.problem
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy


def test_a_column_that_is_there_twice_is_named(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("user,user,rank\nann,ann,1\n")
    with pytest.raises(UserError, match=r"twice.csv.*user, user, rank"):
        read(path)


def test_a_number_that_no_float_holds_exactly_is_read(tmp_path):
    """2^53 + 1 is no rank; as a score it is as good as its neighbour."""
    large = 2**53 + 1
    with pytest.raises(UserError, match=r"row 2, column `rank`"):
        read(parquet(tmp_path, user=ANN, rank=[1, large, 2]))
    scores = parquet(tmp_path, user=ANN, item=["a", "a", "a"], score=[large, 1, 2])
    assert len(read(scores)[0]) == 3


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.parquet").write_text("no")
    for name in ("broken.parquet", "absent.csv"):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


def test_the_main_variant_and_its_fusion_are_compared_with_another_system():
    llara = f"{EXTERNAL}llara"
    pairs = pairs_of_interest(["id_only", "per_layer", "per_layer+id", llara], "per_layer")
    assert ("per_layer", llara) in pairs
    assert ("per_layer+id", llara) in pairs
    assert ("id_only", llara) not in pairs
    cheap = pairs_of_interest(["id_only+cheap", "per_layer+id+cheap", llara], "per_layer")
    assert {("id_only+cheap", llara), ("per_layer+id+cheap", llara)} <= set(cheap)
