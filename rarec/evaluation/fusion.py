"""Late fusion of an arm's score with the ID model's: the honest rival of soft prompts (method, section 7; ours)."""

import numpy as np

from rarec.evaluation.arms import Question, Ranker, rank_all
from rarec.ranking.metrics import SELECTED_BY, SELECTION_CUTOFFS, metric_values
from rarec.ranks import ALONE, Ranks

WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.5, 5.0, 10.0)
"""Of the ID score, relative to the spread of the two scores."""
SPREAD_USERS = 64


def fuse(arm: Ranker, ids: Ranker, validation: Question, processes: Ranks = ALONE) -> tuple[Ranker, float]:
    """Choose the weight with the best NDCG@100 on the validation users; the smallest among equals.

    Args:
        arm: a trained arm.
        ids: the ID model.
        validation: users that decide; never the test users.
        processes: that share them.

    Returns:
        The fused ranker and the weight, relative to the ratio of the two scores' spreads.
    """
    ratio = _spread(arm, validation) / _spread(ids, validation)
    ranks = rank_all(validation, {str(weight): arm.fused(ids, weight * ratio) for weight in WEIGHTS}, processes)
    values = [metric_values(ranks[str(weight)], SELECTION_CUTOFFS)[SELECTED_BY].mean() for weight in WEIGHTS]
    weight = WEIGHTS[int(np.argmax(values))]
    return arm.fused(ids, weight * ratio), weight


def _spread(ranker: Ranker, question: Question) -> float:
    """Mean over some users of the standard deviation of their scores over the catalogue."""
    users = ranker.users(question.user_rows[:SPREAD_USERS], question.histories[:SPREAD_USERS])
    scores_BN = (users.reshape(len(users), -1, ranker.items_NZ.shape[1]) @ ranker.items_NZ.T).max(1)
    return float(scores_BN.std(1).mean()) or 1.0
