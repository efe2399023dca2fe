"""Rank by a neighbour table; `scores` has the formula.

Shape letters: U all users, B users of a chunk, N catalogue.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from rarec.neighbours.scores import factor_of_sums, newest_first, score
from rarec.ranking import EvalBatch, Ranker, Scores


@dataclass(frozen=True)
class NeighbourRanker(Ranker):
    """The root of the sum, over the newest items of the history, of their scores for an item, older ones decayed.

    Attributes:
        table_NN: score of each item's neighbours, 0 for all others.
        newest: number of items of the history that are read.
        decay: factor by each older item.
        lacking_N: see `Ranker`.
        lists: see `Ranker`.
    """

    table_NN: sparse.csr_matrix
    newest: int
    decay: float
    lacking_N: npt.NDArray[np.bool_] | None = None
    lists: bool = field(default=True, init=False)

    def scored(self, chunk: EvalBatch) -> Scores:
        """See `Ranker`."""
        return NeighbourScores(self._newest_BN(chunk.histories), self.table_NN)

    def near(self, histories: Sequence[npt.NDArray[np.integer]]) -> sparse.csr_matrix:
        """Return the scores after some histories, (B, N): of the few items that are neighbours of one of theirs."""
        sums_BN = self._newest_BN(histories) @ self.table_NN
        sums_BN.data = score(sums_BN.data)
        return sums_BN

    def lists_targets(self, batch: EvalBatch) -> npt.NDArray[np.bool_]:
        """Return whether each user's target is a neighbour of the newest items of the history, (U,)."""
        listed = [np.empty(0, np.bool_)]
        for chunk in batch.chunks():
            sums_BN = self._newest_BN(chunk.histories) @ self.table_NN
            listed.append(np.asarray(sums_BN[np.arange(len(chunk.targets)), chunk.targets]).ravel() > 0)
        return np.concatenate(listed)

    def scaled(self, weight_N: npt.NDArray[np.float64]) -> "NeighbourRanker":
        """Return the ranker whose score of each item is its own times the item's weight, not below 0."""
        table, factor_N = self.table_NN, factor_of_sums(weight_N).astype(np.float32)
        scaled = table.data * factor_N[table.indices]
        return replace(self, table_NN=sparse.csr_matrix((scaled, table.indices, table.indptr), table.shape))

    def _newest_BN(self, histories: Sequence[npt.NDArray[np.integer]]) -> sparse.csr_matrix:
        """Return the weight of each item in each user's history: 1 for the newest, smaller for older ones."""
        items, weights, starts = newest_first(histories, self.newest, self.decay)
        return sparse.csr_matrix((weights.astype(np.float32), items, starts), (len(histories), self.table_NN.shape[0]))


class NeighbourScores:
    """Scores of a `NeighbourRanker`."""

    width = 2

    def __init__(self, histories_BN: sparse.csr_matrix, table_NN: sparse.csr_matrix) -> None:
        self._histories_BN, self._table_NN = histories_BN, table_NN
        self.n_users, self.n_items = (int(size) for size in histories_BN.shape)

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        sums_CN = (self._histories_BN[users] @ self._table_NN).toarray()
        return torch.from_numpy(score(sums_CN, out=sums_CN))
