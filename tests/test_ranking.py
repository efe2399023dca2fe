"""Ranks in the full catalogue: by hand, against a naive sort, and on bad vectors."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rarec.errors import UserError
from rarec.ranking.rank import GROUP, VectorScores, best_scores, rank_scores

# Four items on a line: a user at +1 orders them 3, 2, 1, 0.
LINE = np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)
NONE = [np.empty(0, dtype=np.int64)]


def in_blocks(size: int, **changes: int):
    """Hold scores of `size` bytes at a time."""
    return patch.multiple("rarec.ranking.rank", BLOCK_BYTES=size, MOST_BYTES=0, **changes)


def naive_rank(scores_N, target, seen):
    """The worst place of the target in a sort of the items that compete."""
    competing = [item for item in range(len(scores_N)) if item == target or item not in set(seen)]
    order = sorted(competing, key=lambda item: (-scores_N[item], item == target))
    return order.index(target) + 1


def test_a_hand_worked_example():
    users = np.array([[1.0], [-1.0], [1.0]], dtype=np.float32)
    seen = [np.array([], dtype=np.int64), np.array([0]), np.array([2, 3])]
    assert rank_scores(VectorScores(users, LINE), np.array([2, 1, 1]), seen).tolist() == [2, 1, 1]


def test_ties_count_against_the_model():
    """A model that gives all items the same score ranks the target last among what the user has not seen."""
    zeros = np.zeros((1, 1), dtype=np.float32)
    assert rank_scores(VectorScores(zeros, LINE), np.array([1]), NONE).tolist() == [4]
    assert rank_scores(VectorScores(zeros, LINE), np.array([1]), [np.array([0, 3])]).tolist() == [2]


def test_seen_items_may_repeat_and_hold_the_target():
    users = np.array([[1.0]], dtype=np.float32)
    assert rank_scores(VectorScores(users, LINE), np.array([1]), [np.array([3, 3, 1, 3])]).tolist() == [2]


def test_the_best_of_k_interests_scores():
    """Interests +1 and -2: item 0 scores 0, items 1, 2, 3 score 1, 2, 3; with items at -1 the second one wins."""
    items = np.array([[0.0], [1.0], [2.0], [-1.0]], dtype=np.float32)  # scores 0, 1, 2, 2
    users = np.array([[[1.0], [-2.0]]], dtype=np.float32)
    assert [int(rank_scores(VectorScores(users, items), np.array([item]), NONE)[0]) for item in range(4)] == [
        4,
        3,
        2,
        2,
    ]


small = st.integers(-3, 3).map(float)


@st.composite
def problems(draw):
    """Small integers, so that scores are exact and ties frequent."""
    n_users, n_items, dim = (draw(st.integers(1, high)) for high in (7, 9, 3))
    per_user = draw(st.integers(1, 3))
    users = draw(hnp.arrays(np.float32, (n_users, per_user, dim), elements=small))
    items = draw(hnp.arrays(np.float32, (n_items, dim), elements=small))
    row = st.integers(0, n_items - 1)
    targets = np.array(draw(st.lists(row, min_size=n_users, max_size=n_users)))
    seen = draw(st.lists(st.lists(row, max_size=12), min_size=n_users, max_size=n_users))
    return users, items, targets, [np.array(rows, dtype=np.int64) for rows in seen]


@given(problems(), st.integers(1, 400))
def test_rank_equals_a_naive_sort_in_any_chunks(problem, block_bytes):
    users, items, targets, seen = problem
    scores = np.einsum("bkd,nd->bkn", users, items).max(axis=1)
    expected = [naive_rank(*row) for row in zip(scores, targets, seen, strict=True)]
    with in_blocks(block_bytes):
        assert rank_scores(VectorScores(users, items), targets, seen).tolist() == expected


@given(problems(), st.integers(1, 5), st.integers(1, 400), st.sampled_from([1, 2, 3, GROUP]))
def test_top_k_equals_a_naive_sort_in_any_chunks_and_groups(problem, k, block_bytes, group):
    users, items, _, seen = problem
    scores_BN = np.einsum("bkd,nd->bkn", users, items).max(axis=1)
    with in_blocks(block_bytes, GROUP=group):
        rows, best = best_scores(VectorScores(users, items), k, seen)
    for scores, best_rows, values, known in zip(scores_BN, rows, best, seen, strict=True):
        open_items = [item for item in range(len(items)) if item not in set(known.tolist())]
        expected = sorted((scores[item] for item in open_items), reverse=True)[:k]
        real = best_rows[best_rows >= 0]
        assert values[: len(real)].tolist() == scores[real].tolist() == expected
        assert len(set(real.tolist())) == len(real)
        assert set(real.tolist()) <= set(open_items)
        assert (values[len(real) :] == -np.inf).all()


def test_a_target_is_never_parted_from_itself_by_rounding():
    """Real-valued vectors in many chunk sizes: with every other item seen, the rank is 1, and never 0."""
    rng = np.random.default_rng(0)
    users, items = (rng.standard_normal((50, 67)).astype(np.float32) for _ in range(2))
    targets = rng.integers(50, size=50)
    everything = [np.arange(50)] * 50
    for block_bytes in (1, 200, 3000, 1 << 20):
        with in_blocks(block_bytes):
            assert (rank_scores(VectorScores(users, items), targets, everything) == 1).all()


def test_inputs_are_left_as_they_were(tmp_path):
    """Tensors, plain arrays and read-only memory maps give the same ranks, and none of them is changed."""
    rng = np.random.default_rng(0)
    users, items = (rng.standard_normal((6, 4)).astype(np.float32) for _ in range(2))
    targets, seen = np.arange(6), [np.array([0, 5])] * 6
    np.save(tmp_path / "items.npy", items)
    mapped = np.load(tmp_path / "items.npy", mmap_mode="r")
    plain = rank_scores(VectorScores(users, items), targets, seen)
    assert plain.tolist() == rank_scores(VectorScores(users, mapped), targets, seen).tolist()
    assert (
        plain.tolist()
        == rank_scores(VectorScores(torch.from_numpy(users), torch.from_numpy(items)), targets, seen).tolist()
    )
    assert items.tolist() == mapped.tolist()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("side", ["user", "item"])
def test_vectors_without_an_order_are_refused(poison, side):
    users, items = np.full((3, 2), 2.0, dtype=np.float32), np.full((3, 2), 2.0, dtype=np.float32)
    (users if side == "user" else items)[1, 0] = poison
    problem = "overflow" if np.isfinite(poison) else f"{side} vectors are not finite .*row 1"
    with pytest.raises(UserError, match=problem):
        rank_scores(VectorScores(users, items), np.arange(3), NONE * 3)
    with pytest.raises(UserError, match=problem):
        best_scores(VectorScores(users, items), 2, NONE * 3)


def test_vectors_of_different_dimensions_are_refused():
    with pytest.raises(UserError, match=r"2 dimensions.* 1"):
        rank_scores(VectorScores(np.zeros((1, 2), dtype=np.float32), LINE), np.array([0]), NONE)
