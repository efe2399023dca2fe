"""Learn the order of a late fusion's best items on validation users (docs/method.md, section 7).

The loss is the softmax over a user's candidates, whose target is the item that the user took. A user whose target is
none of the candidates teaches nothing.

Shape letters: U users, K candidates, P parts, F features, H hidden units.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rarec.ranking.learned import best_of
from rarec.ranking.order import Candidates, LearnedOrder
from rarec.ranking.rank import EvalBatch, Rows
from rarec.ranking.rankers import FusedRanker

HIDDEN, EPOCHS, RATE, USERS_OF_A_STEP = 32, 5, 3e-3, 64
"""Twice the hidden units or the epochs, and gradient-boosted trees (LambdaMART, 15 or 31 leaves), are no better on
Amazon Beauty: docs/experiments.md."""
FEWEST = 500
"""Users whose target is among the candidates, at least: fewer teach noise."""
_FLAT = 1e-6
"""A feature that differs by no more than this among all examples is not read."""
_USERS_AT_A_TIME = 256
_SEED = 17


class Examples(NamedTuple):
    """The users whose target is one of their candidates.

    Attributes:
        user_rows: of the users, (U,).
        candidates: theirs.
        places_U: the target's place among them.
    """

    user_rows: Rows
    candidates: Candidates
    places_U: Rows

    def without(self, user_rows: Rows) -> "Examples":
        """Return the examples of all other users."""
        kept_U = ~np.isin(self.user_rows, user_rows)
        known = self.candidates
        own = Candidates(known.rows_BK[kept_U], known.shares_BKP[kept_U], known.lengths_B2[kept_U])
        return Examples(self.user_rows[kept_U], own, self.places_U[kept_U])


def examples_of(rankers: Sequence[FusedRanker], batch: EvalBatch) -> Examples:
    """Return the examples of some users: as many times as there are fusions, each with that fusion's candidates."""
    # all fusions read a chunk before the next one comes, so that its users are encoded once
    chunks = [_candidates(rankers, chunk) for chunk in batch.chunks(_USERS_AT_A_TIME)]
    each = [candidates for of_ranker in zip(*chunks, strict=True) for candidates in of_ranker]
    width = min(candidates.rows_BK.shape[1] for candidates in each)  # of a small catalogue, by the longest history
    rows_UK = np.concatenate([candidates.rows_BK[:, :width] for candidates in each])
    shares_UKP = np.concatenate([candidates.shares_BKP[:, :width] for candidates in each])
    lengths_U2 = np.concatenate([candidates.lengths_B2 for candidates in each])
    user_rows, targets_U = (np.tile(own, len(rankers)) for own in (batch.user_rows, batch.targets))
    is_target_UK = rows_UK == targets_U[:, None]
    kept_U = is_target_UK.any(1)
    candidates = Candidates(rows_UK[kept_U], shares_UKP[kept_U], lengths_U2[kept_U])
    return Examples(user_rows[kept_U], candidates, is_target_UK.argmax(1)[kept_U])


def _candidates(rankers: Sequence[FusedRanker], chunk: EvalBatch) -> list[Candidates]:
    return [best_of(ranker.scored(chunk), chunk, slice(0, len(chunk.targets)))[0] for ranker in rankers]


def learn(examples: Examples) -> LearnedOrder:
    """Return the order that is learned from examples."""
    candidates, targets_U = examples.candidates, examples.places_U
    features_UKF = torch.from_numpy(candidates.features_BKF)
    whole_UK = torch.from_numpy(candidates.shares_BKP.sum(2))
    places_U = torch.from_numpy(targets_U)
    moments = [(feature_UK.mean(), feature_UK.std()) for feature_UK in map(Tensor.double, features_UKF.unbind(2))]
    center_F, spread_F = torch.tensor(moments).float().T
    scale_F = spread_F.where(spread_F > _FLAT, torch.inf)  # so that its weights become 0
    features_UKF = (features_UKF - center_F) / scale_F
    unit = float(whole_UK.std()) or 1.0
    draws = torch.Generator().manual_seed(_SEED)
    bound = features_UKF.shape[2] ** -0.5
    first_FH = torch.empty(features_UKF.shape[2], HIDDEN).uniform_(-bound, bound, generator=draws)
    weights = [first_FH, torch.zeros(HIDDEN), torch.zeros(HIDDEN), torch.ones(1)]  # it starts as the fusion orders
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.Adam(weights, RATE)
    steps = EPOCHS * -(-len(places_U) // USERS_OF_A_STEP)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(EPOCHS):
        for users in torch.randperm(len(places_U), generator=draws).split(USERS_OF_A_STEP):
            scores_UK = _scores(features_UKF[users], whole_UK[users] / unit, weights)
            optimizer.zero_grad()
            F.cross_entropy(scores_UK, places_U[users]).backward()
            optimizer.step()
            slower.step()
    first_FH, bias_H, last_H, factor_1 = (weight.detach() for weight in weights)
    first_FH = first_FH / scale_F[:, None]
    bias_H = bias_H - center_F @ first_FH
    return LearnedOrder(first_FH.numpy(), bias_H.numpy(), last_H.numpy(), float(factor_1) / unit)


def _scores(features_UKF: Tensor, whole_UK: Tensor, weights: list[Tensor]) -> Tensor:
    """Return what `LearnedOrder.scores` returns, with gradients."""
    first_FH, bias_H, last_H, factor_1 = weights
    return (features_UKF @ first_FH + bias_H).relu() @ last_H + factor_1 * whole_UK
