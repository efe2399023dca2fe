"""A few test users as people see them: history, target, and the top 10 by title from several arms side by side."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.data.dataset import PreparedDataset
from rarec.evaluation.arms import Question, Ranker

SHOWN_HISTORY = 10
TOP = 10


def example_rows(
    dataset: PreparedDataset,
    question: Question,
    rankers: Mapping[str, Ranker],
    ranks: Mapping[str, npt.NDArray[np.int64]],
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows {user, history, target, target_rank, top} for users drawn at random: nobody picks the flattering ones.

    Args:
        dataset: for ids and titles.
        question: the test users.
        rankers: the arms shown.
        ranks: of the targets, by arm.
        count: how many users.
        seed: of the draw.
    """
    total = len(question.targets)
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    if not len(chosen):
        return []
    histories = [question.histories[at] for at in chosen]
    few = Question(question.user_rows[chosen], histories, question.targets[chosen])
    best = {name: ranker.best(few, TOP) for name, ranker in rankers.items()}
    titles = dataset.titles
    return [
        {
            "user": str(dataset.user_ids[int(few.user_rows[row])]),
            "history": [titles[item] for item in histories[row][-SHOWN_HISTORY:]],
            "target": titles[few.targets[row]],
            "target_rank": {name: int(ranks[name][at]) for name in rankers},
            "top": {name: [titles[item] for item in best[name][row] if item >= 0] for name in rankers},
        }
        for row, at in enumerate(chosen)
    ]
