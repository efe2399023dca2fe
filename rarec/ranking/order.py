"""A learned order of a fusion's best items, by a small network that knows the user (docs/method.md, section 7).

Needs numpy alone: exported folders hold a copy of this file. Shape letters: B users, N catalogue, K candidates of a
user, P parts, F features, H hidden units.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
CANDIDATES = 200


@dataclass(frozen=True)
class Candidates:
    """The best items of some users by a fusion, best first.

    Attributes:
        rows_BK: their rows.
        shares_BKP: what each part adds to each one's score.
        lengths_B2: of each history, the number of items, and of different ones.
    """

    rows_BK: Rows
    shares_BKP: Float32
    lengths_B2: npt.NDArray[np.int64]

    @property
    def features_BKF(self) -> Float32:
        """Return what the network reads of each candidate.

        Of each part its share, how far that is below the user's best, and the log of its place among the candidates; of
        the whole how far it is below the best, and the log of its place; of the user the log of the history's length,
        and the part of it that are different items.
        """
        shares_BKP = self.shares_BKP
        users, count, _ = shares_BKP.shape
        order_BKP = np.argsort(-shares_BKP, axis=1, kind="stable")
        places_BKP = np.empty_like(shares_BKP)
        np.put_along_axis(places_BKP, order_BKP, np.arange(count, dtype=np.float32)[:, None], axis=1)
        whole_BK1 = shares_BKP.sum(2, keepdims=True)
        places_K1 = np.log1p(np.arange(count))[:, None]
        lengths_B2 = np.maximum(self.lengths_B2, 1)
        user_B2 = np.stack([np.log(lengths_B2[:, 0]), lengths_B2[:, 1] / lengths_B2[:, 0]], 1)
        parts = [
            shares_BKP,
            shares_BKP - shares_BKP.max(1, keepdims=True),
            np.log1p(places_BKP),
            whole_BK1 - whole_BK1.max(1, keepdims=True),
            np.broadcast_to(places_K1, (users, count, 1)),
            np.broadcast_to(user_B2[:, None], (users, count, 2)),
        ]
        return np.concatenate(parts, 2, dtype=np.float32)


@dataclass(frozen=True)
class LearnedOrder:
    """The weights of the network: one hidden layer, beside the fusion's own score.

    Attributes:
        first_FH: weights of the hidden layer.
        bias_H: its bias.
        last_H: weights of the score.
        factor: of the fusion's score, which is added.
    """

    first_FH: Float32
    bias_H: Float32
    last_H: Float32
    factor: float

    def check(self, parts: int) -> None:
        """Raise `ValueError` unless the weights are those of a network for so many parts, with a hidden unit."""
        shapes = self.first_FH.shape, self.bias_H.shape, self.last_H.shape
        hidden = self.bias_H.size
        if shapes != ((3 * parts + 4, hidden), (hidden,), (hidden,)) or not hidden:
            raise ValueError(f"an order of weights {shapes} is not one of {parts} parts")

    def scores(self, candidates: Candidates) -> Float32:
        """Return the scores by which candidates are ordered, (B, K)."""
        hidden_BKH = np.maximum(candidates.features_BKF @ self.first_FH + self.bias_H, 0)
        scores_BK: Float32 = hidden_BKH @ self.last_H + np.float32(self.factor) * candidates.shares_BKP.sum(2)
        return scores_BK


def reordered(order: LearnedOrder, shares_NP: Float32, history: Any, *, exclude_seen: bool = True) -> Float32:
    """Return the scores of the catalogue with the fusion's best items in a learned order, above all others, (N,).

    Args:
        order: what was learned.
        shares_NP: what each part adds to the score of each item.
        history: item rows.
        exclude_seen: whether the items of the history are not among the best.
    """
    scores_N: Float32 = shares_NP.sum(1)
    competing_N = scores_N.copy()
    different = len(set(history))
    if exclude_seen:
        competing_N[history] = -np.inf
    count = min(CANDIDATES, len(scores_N) - exclude_seen * different)
    rows_K = np.argsort(-competing_N, kind="stable")[: max(1, count)]
    candidates = Candidates(rows_K[None], shares_NP[rows_K][None], np.array([[len(history), different]]))
    scores_K = order.scores(candidates)[0]
    scores_N[rows_K] = scores_K + (scores_N.max() - scores_K.min() + 1)
    return scores_N
