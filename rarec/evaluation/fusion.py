"""Late fusion: the weighted sum of a variant's score and the ID model's (docs/method.md, section 7; our choice).

Late fusion of text and ID scores is the baseline that soft prompts must beat. The weights are fitted by maximum
likelihood on validation users: the weighted sum is the logit of a softmax over the items that a user has not seen. A
top-k metric would serve as well, but is nearly flat over the weights, so a few users would decide.

Shape letters: U users, B users of a block, N catalogue, Z and E sizes of vectors, K vectors of a user.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rarec.ranking import EvalBatch, Ranker

COMPARED_USERS = 64
FLAT = 1e-5
"""Smallest spread of scores, relative to the largest score: a smaller spread is rounding, and counts as none."""
LIMIT = 100.0
"""Largest weight, relative to the spreads of the two scores: the weight if the variant carries no information."""
_BLOCK = 1 << 22
"""Number of scores in a block."""
_PENALTY = 1e-4
"""Penalty on squared weights, per user: it keeps them finite if the targets are always first."""
_STEPS, _CLOSE = 50, 1e-3
"""Newton's method: the maximum number of steps, and the length of a step at which it has converged."""
Floats = npt.NDArray[np.float64]


def fuse(variant: Ranker, ids: Ranker, validation: EvalBatch) -> tuple[Ranker, float]:
    """Fit the weight of the ID score on the validation users.

    Args:
        variant: a trained variant.
        ids: the ID model.
        validation: users to fit the weight on; never the test users.

    Returns:
        The fused ranker, and the weight relative to the ratio of the two scores' spreads, from 0 to `LIMIT`.
    """
    compared = _compared(variant, ids, validation)
    both = variant.fused(ids, compared.variant / compared.ids, compared.slope)
    own, others = _fitted(_Scores.of(variant, both, validation, compared.variant))
    weight = float(np.clip(others / own, 0.0, LIMIT)) if own > 0 else LIMIT
    return variant.fused(ids, weight * compared.variant / compared.ids, compared.slope), weight


class _Compared(NamedTuple):
    """Statistics of both scores over the items that have an ID vector.

    Attributes:
        variant: spread of the variant's score.
        ids: spread of the ID score.
        slope: least-squares slope of the ID score over the variant's.
    """

    variant: float
    ids: float
    slope: float


def _compared(variant: Ranker, ids: Ranker, batch: EvalBatch) -> _Compared:
    """Compare both scores on a few users."""
    some = EvalBatch(batch.user_rows[:COMPARED_USERS], batch.histories[:COMPARED_USERS], batch.targets)
    known = slice(None) if ids.lacking_N is None else ~ids.lacking_N
    variant_BN, ids_BN = (ranker.scores(some)[:, known].astype(np.float64) for ranker in (variant, ids))
    own, others = _spread(variant_BN), _spread(ids_BN)
    variant_BN -= variant_BN.mean(1, keepdims=True)
    slope = float((variant_BN * ids_BN).sum() / (variant_BN * variant_BN).sum()) if own else 0.0
    return _Compared(own or 1.0, others or 1.0, slope)


def _spread(scores_BN: Floats) -> float:
    """Return the standard deviation over items, averaged over users; 0 if all scores are equal up to rounding."""
    spread = float(scores_BN.std(1).mean())
    return spread if spread > FLAT * np.abs(scores_BN).max() else 0.0


@dataclass(frozen=True)
class _Scores:
    """Both scores of the validation users, recomputed in each pass because they may not fit in memory.

    The ID score is scaled to the variant's spread, so that float32 can represent their sum; then both are divided by
    that spread.
    """

    own_UZ: Tensor
    items_NZ: Tensor
    both_UKE: Tensor
    items_NE: Tensor
    batch: EvalBatch
    spread: float

    @classmethod
    def of(cls, variant: Ranker, both: Ranker, batch: EvalBatch, spread: float) -> "_Scores":
        """Compute the user vectors of the variant and of the sum of both."""
        parts = [
            [torch.from_numpy(ranker.users(part.user_rows, part.histories)) for ranker in (variant, both)]
            for part in batch.chunks()  # both on one chunk before the next, so that the variant encodes it once
        ]
        own_UZ, both_UKE = (torch.cat(vectors) for vectors in zip(*parts, strict=True))
        items_NZ, items_NE = (torch.from_numpy(ranker.items_NZ) for ranker in (variant, both))
        return cls(own_UZ, items_NZ, both_UKE, items_NE, batch, spread)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield both scores (2, B, N), a mask of seen items (B, N), and the targets (B,)."""
        size = max(_BLOCK // len(self.items_NZ), 1)
        for start in range(0, len(self.own_UZ), size):
            part = slice(start, start + size)
            own_BN = self.own_UZ[part] @ self.items_NZ.T
            others_BN = (self.both_UKE[part] @ self.items_NE.T).amax(1) - own_BN
            targets_B = torch.as_tensor(np.asarray(self.batch.targets[part], np.int64))
            seen_BN = torch.zeros(own_BN.shape, dtype=torch.bool)
            for row, history in enumerate(self.batch.histories[part]):
                seen_BN[row, torch.as_tensor(np.asarray(history, np.int64))] = True
            seen_BN[torch.arange(len(targets_B)), targets_B] = False
            yield torch.stack([own_BN, others_BN]) / self.spread, seen_BN, targets_B


def _fitted(scores: _Scores) -> Floats:
    """Return the two weights, by Newton's method; the likelihood is concave, and steps that overshoot are halved."""
    weights: Floats = np.ones(2)
    step: Floats = np.zeros(2)
    best = -np.inf
    for _ in range(_STEPS):
        found = _likelihood(scores, weights + step)
        if found.value < best:
            step = step / 2
        else:
            weights, best = weights + step, found.value
            step = np.asarray(np.linalg.solve(found.curve, found.slope), np.float64)
        if np.abs(step).max() < _CLOSE:
            break
    return weights


class _Likelihood(NamedTuple):
    """Log-likelihood per user minus the penalty, its gradient, and its negative Hessian."""

    value: float
    slope: Floats
    curve: Floats


def _likelihood(scores: _Scores, weights: Floats) -> _Likelihood:
    value, users = 0.0, 0
    slope: Floats = np.zeros(2)
    curve: Floats = np.zeros((2, 2))
    for both_2BN, seen_BN, targets_B in scores.blocks():
        logits_BN = torch.einsum("s,sbn->bn", torch.from_numpy(weights).float(), both_2BN)
        log_BN = logits_BN.masked_fill(seen_BN, -torch.inf).log_softmax(1)
        at_B = torch.arange(len(targets_B))
        chance_BN = log_BN.exp()
        mean_2B = torch.einsum("bn,sbn->sb", chance_BN, both_2BN).double()
        square_22 = torch.einsum("bn,sbn,tbn->st", chance_BN, both_2BN, both_2BN).double()
        value += float(log_BN[at_B, targets_B].double().sum())
        slope += (both_2BN[:, at_B, targets_B] - mean_2B).sum(1).numpy()
        curve += (square_22 - mean_2B @ mean_2B.T).numpy()
        users += len(targets_B)
    penalty = _PENALTY * float(weights @ weights) / 2
    return _Likelihood(
        value / users - penalty, slope / users - _PENALTY * weights, curve / users + _PENALTY * np.eye(2)
    )
