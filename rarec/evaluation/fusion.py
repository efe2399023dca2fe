"""Late fusion of an arm's score with the ID model's: the honest rival of soft prompts (method, section 7; ours)."""

import numpy as np

from rarec.evaluation.arms import Question, Ranker, rank_all
from rarec.ranking.metrics import SELECTED_BY, SELECTION_CUTOFFS, metric_values
from rarec.ranks import ALONE, Ranks

WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.5, 5.0, 10.0)
"""Of the ID score, relative to the spread of the two scores."""
COMPARED_USERS = 64


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
    ratio, slope = _compared(arm, ids, validation)
    fused = {weight: arm.fused(ids, weight * ratio, slope) for weight in WEIGHTS}
    ranks = rank_all(validation, {str(weight): ranker for weight, ranker in fused.items()}, processes)
    values = [metric_values(ranks[str(weight)], SELECTION_CUTOFFS)[SELECTED_BY].mean() for weight in WEIGHTS]
    weight = WEIGHTS[int(np.argmax(values))]
    return fused[weight], weight


def _compared(arm: Ranker, ids: Ranker, question: Question) -> tuple[float, float]:
    """How both score the items that the ID model knows, for some users.

    Returns:
        The ratio of the spreads, and how much of ID score goes with one of the arm's, by least squares.
    """
    some = Question(question.user_rows[:COMPARED_USERS], question.histories[:COMPARED_USERS], question.targets)
    known = slice(None) if ids.lacking_N is None else ~ids.lacking_N
    arm_BN, ids_BN = arm.scores(some)[:, known], ids.scores(some)[:, known]
    ratio = (float(arm_BN.std(1).mean()) or 1.0) / (float(ids_BN.std(1).mean()) or 1.0)
    arm_BN = arm_BN - arm_BN.mean(1, keepdims=True)
    return ratio, float((arm_BN * ids_BN).sum() / ((arm_BN * arm_BN).sum() or 1.0))
