"""A few test users as people see them: history, target, and the top 10 by title from several variants side by side."""

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
    """Users drawn at random among those of a batch: nobody picks the flattering ones.

    Attributes:
        rows: theirs in the batch.
        few: what it asks of them.
    """

    rows: npt.NDArray[np.int64]
    few: EvalBatch

    @classmethod
    def drawn(cls, batch: EvalBatch, count: int, seed: int) -> "Examples":
        """At most so many of the batch's users."""
        total = len(batch.targets)
        rows = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
        histories = [batch.histories[at] for at in rows]
        return cls(rows, EvalBatch(batch.user_rows[rows], histories, batch.targets[rows]))

    def best(self, ranker: Ranker) -> npt.NDArray[np.int64]:
        """The items that a variant puts first for each of them."""
        return ranker.top_k(self.few, TOP) if len(self.rows) else np.empty((0, TOP), np.int64)

    def table(
        self,
        dataset: PreparedDataset,
        best: Mapping[str, npt.NDArray[np.int64]],
        ranks: Mapping[str, npt.NDArray[np.int64]],
    ) -> list[dict[str, Any]]:
        """Rows {user, history, target, target_rank, top}.

        Args:
            dataset: for ids and titles.
            best: of each variant that is shown.
            ranks: of all the batch's targets, by variant.
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
