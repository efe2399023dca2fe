"""Rank by a neighbour table: an item's score is the sum over the newest items of the history that it is near to.

Shape letters: B users of a chunk, C users of a block, N catalogue.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from scipy import sparse

from rarec.ranking import EvalBatch, Ranker, Scores

BLOCK = 1 << 22
"""Number of scores in a block."""


@dataclass(frozen=True)
class NeighbourRanker(Ranker):
    """The root of the sum, over the newest items of the history, of their scores for an item, older ones decayed.

    The root, because the sums are so skewed that few of them would decide the weights of a fusion.

    Attributes:
        table_NN: score of each item's neighbours, 0 for all others.
        newest: number of items of the history that are read.
        decay: factor by each older item.
        lacking_N: see `Ranker`.
    """

    table_NN: sparse.csr_matrix
    newest: int
    decay: float
    lacking_N: npt.NDArray[np.bool_] | None = None

    def scored(self, chunk: EvalBatch) -> Scores:
        """See `Ranker`."""
        recent = [history[-self.newest :][::-1] for history in chunk.histories]
        lengths = [len(history) for history in recent]
        ages = np.concatenate([np.arange(length) for length in lengths]) if recent else np.empty(0, np.int64)
        rows = np.concatenate(recent) if recent else ages
        starts = np.cumsum([0, *lengths])
        weights = (self.decay**ages).astype(np.float32)
        histories_BN = sparse.csr_matrix((weights, rows, starts), (len(recent), self.table_NN.shape[0]))
        return NeighbourScores(histories_BN, self.table_NN)

    def lists_targets(self, batch: EvalBatch) -> npt.NDArray[np.bool_]:
        """Return whether each user's target is a neighbour of the newest items of the history, (U,)."""
        found = [np.empty(0, np.bool_)]
        for chunk in batch.chunks():
            scores, targets_B = self.scored(chunk), torch.as_tensor(np.asarray(chunk.targets, np.int64))
            size = max(BLOCK // scores.n_items, 1)
            for start in range(0, scores.n_users, size):
                part = slice(start, min(start + size, scores.n_users))
                found.append((scores.block(part).gather(1, targets_B[part, None])[:, 0] > 0).numpy())
        return np.concatenate(found)


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


def read_table(path: Path, n_items: int) -> sparse.csr_matrix:
    """Read a neighbour table as a sparse matrix, (N, N)."""
    table = pq.read_table(path)
    rows, columns, scores = (table[name].to_numpy() for name in ("item_row", "neighbour_row", "score"))
    return sparse.csr_matrix((scores, (rows, columns)), (n_items, n_items))
