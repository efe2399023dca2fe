"""A learned order: the best items of a late fusion, ranked again by a small network that knows the user.

The fusion gives its 200 best items; the network reads what each part says of each of them and how long the history is,
and orders them anew (docs/method.md, section 7; our choice). All other items follow in the order of the fusion.

Shape letters: B users, C users of a block, N catalogue, K candidates of a user, P parts, F features, H hidden units.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rarec.ranking.rank import EvalBatch, Rows, Scores, largest, seen_pairs
from rarec.ranking.rankers import FusedRanker, FusedScores, Ranker

Float32 = npt.NDArray[np.float32]
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


@dataclass(frozen=True)
class LearnedRanker(Ranker):
    """A late fusion whose best items are in a learned order.

    Attributes:
        fusion: the late fusion.
        order: what was learned.
    """

    fusion: FusedRanker
    order: LearnedOrder

    def scored(self, chunk: EvalBatch) -> Scores:
        """See `Ranker`."""
        return LearnedScores(self.fusion.scored(chunk), chunk, self.order)


class LearnedScores:
    """Scores of a `LearnedRanker`: of the candidates above all others', which are those of the fusion."""

    def __init__(self, fused: FusedScores, chunk: EvalBatch, order: LearnedOrder) -> None:
        self._fused, self._chunk, self._order = fused, chunk, order
        self.n_users, self.n_items, self.width = fused.n_users, fused.n_items, 2 * fused.width

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        candidates, whole_CN = best_of(self._fused, self._chunk, users)
        scores_CK = torch.from_numpy(self._order.scores(candidates)).to(whole_CN.device)
        above_C1 = whole_CN.amax(1, keepdim=True) - scores_CK.amin(1, keepdim=True) + 1
        rows_CK = torch.from_numpy(candidates.rows_BK).to(whole_CN.device)
        return whole_CN.scatter(1, rows_CK, scores_CK + above_C1)


def best_of(fused: FusedScores, chunk: EvalBatch, users: slice) -> tuple[Candidates, torch.Tensor]:
    """Return the candidates of some users of a chunk, and the scores of the whole catalogue by the fusion, (C, N).

    Items of the history are no candidates; a target competes in any case.
    """
    histories: Sequence[Rows] = chunk.histories[users]
    shares = list(fused.shares(users))
    whole_CN = torch.stack(shares).sum(0)
    competing_CN = whole_CN.clone()
    competing_CN[seen_pairs(histories)] = -torch.inf
    targets_C = np.asarray(chunk.targets[users], np.int64)
    present = np.flatnonzero(targets_C >= 0)
    competing_CN[present, targets_C[present]] = whole_CN[present, targets_C[present]]
    lengths_C2 = np.array([(len(history), len(np.unique(history))) for history in histories]).reshape(-1, 2)
    count = min(CANDIDATES, fused.n_items - lengths_C2[:, 1].max(initial=0))
    rows_CK = largest(competing_CN, max(count, 1))[1]
    shares_CKP = torch.stack([share_CN.gather(1, rows_CK) for share_CN in shares], 2)
    return Candidates(rows_CK.numpy(force=True), shares_CKP.numpy(force=True), lengths_C2), whole_CN


def candidates_of(ranker: FusedRanker, batch: EvalBatch, users_at_a_time: int) -> Iterator[tuple[Candidates, Rows]]:
    """Yield the candidates of some users after the other, with the users' targets."""
    for chunk in batch.chunks(users_at_a_time):
        everyone = slice(0, len(chunk.targets))
        yield best_of(ranker.scored(chunk), chunk, everyone)[0], np.asarray(chunk.targets)
