"""Examples for the report: a few test users with history, target, and the top 10 titles of several variants."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.data.dataset import PreparedDataset
from rarec.ranking import EvalBatch, Ranker

SHOWN_HISTORY = 10
TOP = 10


@dataclass(frozen=True)
class Examples:
    """Users drawn at random from a batch, so that nobody picks flattering ones.

    Attributes:
        rows: their rows in the batch.
        few: the batch of these users alone.
    """

    rows: npt.NDArray[np.int64]
    few: EvalBatch

    @classmethod
    def drawn(cls, batch: EvalBatch, count: int, seed: int) -> "Examples":
        """Draw at most `count` of the batch's users."""
        total = len(batch.targets)
        rows = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
        histories = [batch.histories[at] for at in rows]
        return cls(rows, EvalBatch(batch.user_rows[rows], histories, batch.targets[rows]))

    def best(self, ranker: Ranker) -> npt.NDArray[np.int64]:
        """Return the item rows of each user's top 10, (users, 10)."""
        return ranker.top_k(self.few, TOP) if len(self.rows) else np.empty((0, TOP), np.int64)

    def table(
        self,
        dataset: PreparedDataset,
        best: Mapping[str, npt.NDArray[np.int64]],
        ranks: Mapping[str, npt.NDArray[np.int64]],
    ) -> list[dict[str, Any]]:
        """Return one row {user, history, target, target_rank, top} per user.

        Args:
            dataset: for ids and titles.
            best: top 10 of each variant to show, from `best`.
            ranks: ranks of all the batch's targets, by variant.
        """
        titles, few = dataset.titles, self.few
        return [
            {
                "user": str(dataset.user_ids[int(few.user_rows[row])]),
                "history": [titles[item] for item in few.histories[row][-SHOWN_HISTORY:]],
                "target": titles[few.targets[row]],
                "target_rank": {name: int(ranks[name][at]) for name in best},
                "top": {name: [titles[item] for item in best[name][row] if item >= 0] for name in best},
            }
            for row, at in enumerate(self.rows)
        ]
