"""Rank by a neighbour table: an item's score is the root of its summed scores as a neighbour of the newest items.

Shape letters: U all users, B users of a chunk, N catalogue.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from rarec.ranking import EvalBatch, Ranker, Scores


@dataclass(frozen=True)
class NeighbourRanker(Ranker):
    """The root of the sum, over the newest items of the history, of their scores for an item, older ones decayed.

    The root, because the sums are so skewed that few of them would decide the weights of a fusion.

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
        return NeighbourScores(self._newest_BN(chunk), self.table_NN)

    def near(self, histories: Sequence[npt.NDArray[np.integer]]) -> sparse.csr_matrix:
        """Return the scores after some histories, (B, N): of the few items that are neighbours of one of theirs."""
        nobody = np.zeros(len(histories), np.int64)
        found_BN = self._newest_BN(EvalBatch(nobody, histories, nobody)) @ self.table_NN
        found_BN.data = np.sqrt(found_BN.data)
        return found_BN

    def lists_targets(self, batch: EvalBatch) -> npt.NDArray[np.bool_]:
        """Return whether each user's target is a neighbour of the newest items of the history, (U,)."""
        found = [np.empty(0, np.bool_)]
        for chunk in batch.chunks():
            near_BN = self._newest_BN(chunk) @ self.table_NN
            found.append(np.asarray(near_BN[np.arange(len(chunk.targets)), chunk.targets]).ravel() > 0)
        return np.concatenate(found)

    def _newest_BN(self, chunk: EvalBatch) -> sparse.csr_matrix:
        """Return the weight of each item in each user's history: 1 for the newest, smaller for older ones."""
        recent = [history[-self.newest :][::-1] for history in chunk.histories]
        lengths = [len(history) for history in recent]
        ages = np.concatenate([np.arange(length) for length in lengths]) if recent else np.empty(0, np.int64)
        rows = np.concatenate(recent) if recent else ages
        weights = (self.decay**ages).astype(np.float32)
        return sparse.csr_matrix((weights, rows, np.cumsum([0, *lengths])), (len(recent), self.table_NN.shape[0]))


class NeighbourScores:
    """Scores of a `NeighbourRanker`."""

    width = 2

    def __init__(self, histories_BN: sparse.csr_matrix, table_NN: sparse.csr_matrix) -> None:
        self._histories_BN, self._table_NN = histories_BN, table_NN
        self.n_users, self.n_items = (int(size) for size in histories_BN.shape)

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        found = (self._histories_BN[users] @ self._table_NN).toarray()
        return torch.from_numpy(np.sqrt(found, out=found))
