"""Ranking of arms and their late fusion: one dot product of what stands side by side, the best of K where there are."""

from dataclasses import replace

import numpy as np
import pytest

from rarec.evaluation.arms import Question, Ranker, rank_all
from rarec.evaluation.figures import pairs_of_interest
from rarec.evaluation.fusion import WEIGHTS, fuse

RNG = np.random.default_rng(0)


def ranker(users: np.ndarray, items: np.ndarray) -> Ranker:
    """Of fixed vectors, whatever the histories."""
    return Ranker(items.astype(np.float32), lambda rows, histories: users[rows].astype(np.float32))


@pytest.fixture
def text() -> Ranker:
    return ranker(RNG.standard_normal((5, 3)), RNG.standard_normal((7, 3)))


@pytest.mark.parametrize("interests", [1, 4])
def test_a_fused_score_is_the_sum_of_both(text, interests):
    ids = ranker(RNG.standard_normal((5, interests, 2)), RNG.standard_normal((7, 2)))
    rows, histories = np.arange(5), [np.array([], int)] * 5
    fused = text.fused(ids, 0.7, 0.0)
    scores_BN = (fused.users(rows, histories) @ fused.items_NZ.T).max(1)
    own_BN = text.users(rows, histories) @ text.items_NZ.T
    others_BN = (ids.users(rows, histories) @ ids.items_NZ.T).max(1)
    assert np.allclose(scores_BN, own_BN + 0.7 * others_BN, atol=1e-5)


def test_an_item_that_the_id_model_does_not_know_has_the_score_that_the_arm_lets_expect():
    """ID scores are 5 - 2 x the arm's, but item 3 has no vector: as if it had one, it lies on the same line."""
    arm_N, lacking_N = np.array([1.0, 4.0, 7.0, 9.0, -3.0]), np.arange(5) == 3
    id_N = 5 - 2 * arm_N
    arm = ranker(np.ones((6, 1)), arm_N[:, None])
    gapped = np.where(lacking_N, id_N[~lacking_N].mean(), id_N)
    ids = replace(ranker(np.ones((6, 1)), gapped[:, None]), lacking_N=lacking_N)
    question = Question(np.arange(6), [np.array([], int)] * 6, np.full(6, 4))  # the lowest of the arm's: weight counts
    fused, weight = fuse(arm, ids, question)
    assert weight > 0
    ratio = arm_N[~lacking_N].std() / id_N[~lacking_N].std()
    expected_N = arm_N + weight * ratio * id_N
    assert np.allclose(fused.scores(question), expected_N, atol=1e-5)


@pytest.mark.parametrize("interests", [1, 3])
def test_the_weight_is_the_one_that_ranks_the_validation_users_best(interests):
    """The arm scores everything alike, the ID model knows every target: any weight will do but none."""
    flat = ranker(np.zeros((6, 2)), RNG.standard_normal((9, 2)))
    items, targets = np.eye(9), np.arange(6)
    users = np.zeros((6, interests, 9))
    users[:, interests - 1] = items[:6]
    question = Question(np.arange(6), [np.array([8])] * 6, targets)
    fused, weight = fuse(flat, ranker(users, items), question)
    assert weight == WEIGHTS[1]
    assert (rank_all(question, {"fused": fused})["fused"] == 1).all()


def test_ranks_beyond_the_tenth_count_when_the_weight_is_chosen():
    """The arm scores everything alike; the ID model has 40 items before the target: NDCG@10 is 0 by any weight."""
    flat = ranker(np.zeros((6, 1)), RNG.standard_normal((150, 1)))
    descending = ranker(np.ones((6, 1)), -np.arange(150.0)[:, None])
    question = Question(np.arange(6), [np.array([149])] * 6, np.full(6, 40))
    fused, weight = fuse(flat, descending, question)
    assert weight == WEIGHTS[1]
    assert (rank_all(question, {"fused": fused})["fused"] == 41).all()


@pytest.mark.parametrize("main", ["text_only", "input", "per_layer"])
def test_no_arm_is_compared_with_itself(main):
    arms = ["id_only", *(name + part for name in ("text_only", "input", "per_layer") for part in ("", "+id"))]
    pairs = pairs_of_interest(arms, main)
    assert all(arm != other for arm, other in pairs)
    assert {(main, "id_only"), (f"{main}+id", "id_only"), (f"{main}+id", main)} <= set(pairs)
