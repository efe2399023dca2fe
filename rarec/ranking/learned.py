"""A late fusion whose best items are ranked again in a learned order, many users at a time.

The fusion gives its 200 best items; `order.py` orders them anew. All others follow in the order of the fusion.

Shape letters: B users, C users of a block, N catalogue, K candidates of a user, P parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rarec.ranking.order import CANDIDATES, Candidates, LearnedOrder
from rarec.ranking.rank import EvalBatch, Rows, Scores, largest, seen_pairs
from rarec.ranking.rankers import FusedRanker, FusedScores, Ranker


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

    Seen items and hidden ones are no candidates; a target competes in any case.
    """
    histories: Sequence[Rows] = chunk.histories[users]
    shares = list(fused.shares(users))
    whole_CN = torch.stack(shares).sum(0)
    competing_CN = whole_CN.clone()
    competing_CN[seen_pairs(chunk.seen[users])] = -torch.inf
    hidden = np.empty(0, np.int64) if fused.hidden_N is None else np.flatnonzero(fused.hidden_N)
    competing_CN[:, hidden] = -torch.inf
    targets_C = np.asarray(chunk.targets[users], np.int64)
    present = np.flatnonzero(targets_C >= 0)
    competing_CN[present, targets_C[present]] = whole_CN[present, targets_C[present]]
    lengths_C2 = np.array([(len(history), len(np.unique(history))) for history in histories]).reshape(-1, 2)
    seen = lengths_C2[:, 1].max(initial=0) if chunk.exclude_seen else 0
    count = min(CANDIDATES, fused.n_items - len(hidden) - seen)
    rows_CK = largest(competing_CN, max(count, 1))[1]
    shares_CKP = torch.stack([share_CN.gather(1, rows_CK) for share_CN in shares], 2)
    return Candidates(rows_CK.numpy(force=True), shares_CKP.numpy(force=True), lengths_C2), whole_CN
