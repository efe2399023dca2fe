"""Late fusion: the weighted sum of several models' scores (docs/method.md, section 7; our choice).

Late fusion of text and ID scores is the baseline that soft prompts must beat. The weights are fitted by maximum
likelihood on validation users: the weighted sum is the logit of a softmax over the items that a user has not seen. A
top-k metric would serve as well, but is nearly flat over the weights, so a few users would decide.

Shape letters: P parts, B users of a block, N catalogue.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from torch import Tensor

from rarec.ranking import EvalBatch, FusedRanker, Ranker, Scores

COMPARED_USERS = 64
FLAT = 1e-5
"""Smallest spread of scores, relative to the largest score: a smaller spread is rounding, and counts as none."""
_BLOCK = 1 << 22
"""Number of scores in a block, those of all parts together."""
_PENALTY = 1e-4
"""Penalty on squared weights, per user: it keeps them finite if the targets are always first."""
_STEPS, _CLOSE = 50, 1e-3
"""Newton's method: the maximum number of steps, and the length of a step at which it has converged."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fusion:
    """A late fusion, and what went into it.

    Attributes:
        ranker: the fused model.
        parts: names of its parts, in its order.
        weights: of each part's score, each relative to the spread of that score; not negative, their sum is 1.
        flat: names of parts that give every item the same score, which adds nothing.
    """

    ranker: FusedRanker
    parts: tuple[str, ...]
    weights: dict[str, float]
    flat: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return what it takes to score again: for each part its name, share, weight and slope (see `FusedRanker`)."""
        ranker = self.ranker
        return {
            name: {"share": self.weights[name], "weight": weight, "slope": slope}
            for name, weight, slope in zip(self.parts, ranker.weights, ranker.slopes, strict=True)
        }


def fuse(parts: Mapping[str, Ranker], validation: EvalBatch) -> Fusion:
    """Fit the weights of several models' scores on the validation users.

    Where a part lacks an item, its score is predicted from that of the first part that lacks none.

    Args:
        parts: by name.
        validation: users to fit the weights on; never the test users.
    """
    names = sorted(parts, key=lambda name: parts[name].lacking_N is not None)
    rankers = tuple(parts[name] for name in names)
    spreads, slopes = _compared(rankers, validation)
    plain = FusedRanker(rankers, tuple(1 / spread for spread in spreads), slopes)
    fitted = _ValidationScores(plain, validation).fitted()
    shares = fitted / fitted.sum() if fitted.any() else np.full(len(names), 1 / len(names))
    weights = [float(share / spread) for share, spread in zip(shares, spreads, strict=True)]
    largest = max(weights) or 1.0  # so that float32 can represent the sum, whatever the scales
    fused = replace(plain, weights=tuple(weight / largest for weight in weights))
    found = dict(zip(names, map(float, shares), strict=True))
    flat = tuple(name for name, spread in zip(names, spreads, strict=True) if np.isinf(spread))
    return Fusion(fused, tuple(names), {name: found[name] for name in parts}, flat)


def _compared(rankers: tuple[Ranker, ...], batch: EvalBatch) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compare the parts' scores on a few users: their spreads, and their least-squares slopes over the first one's."""
    few = slice(COMPARED_USERS)
    some = EvalBatch(batch.user_rows[few], batch.histories[few], batch.targets[few])
    scored = [ranker.scored(some) for ranker in rankers]
    found: list[list[Floats]] = [[] for _ in rankers]
    for part in _slices(len(some.targets), scored[0].n_items * len(rankers)):
        first_BN = _doubles(scored[0], part)
        for at, (ranker, scores) in enumerate(zip(rankers, scored, strict=True)):
            own_BN = _doubles(scores, part) if at else first_BN
            known = slice(None) if ranker.lacking_N is None else ~ranker.lacking_N
            found[at].append(_sums(first_BN[:, known], own_BN[:, known]))
    spreads, slopes = [], []
    for sums in found:
        own_B, own_peak_B, first_B, first_peak_B, square_B, product_B = np.concatenate(sums, axis=1)
        spreads.append(_spread(own_B, own_peak_B) or np.inf)  # a part that is constant adds nothing
        varies = _spread(first_B, first_peak_B) > 0
        slope = float(product_B.sum() / square_B.sum()) if varies else 0.0
        slopes.append(max(slope, 0.0) if rankers[0].lists else slope)  # to be listed never lowers a score
    return tuple(spreads), tuple(slopes)


def _sums(first_BN: Floats, own_BN: Floats) -> Floats:
    """Return what a comparison sums over users, (6, B).

    The standard deviation and largest magnitude of a part's scores, the same of the first part's without their mean,
    the sum of the squares of these, and the sum of their products with the part's.
    """
    apart_BN = first_BN - first_BN.mean(1, keepdims=True)
    sizes = [size_B for each in (own_BN, apart_BN) for size_B in (each.std(1), np.abs(each).max(1))]
    return np.stack([*sizes, (apart_BN * apart_BN).sum(1), (apart_BN * own_BN).sum(1)])


def _spread(deviation_B: Floats, peak_B: Floats) -> float:
    """Return the standard deviation over items, averaged over users; 0 if all scores are equal up to rounding."""
    spread = float(deviation_B.mean())
    return spread if spread > FLAT * peak_B.max() else 0.0


def _slices(users: int, scores_each: int) -> Iterator[slice]:
    """Yield the users a block at a time, given how many scores one of them has."""
    size = max(_BLOCK // scores_each, 1)
    return (slice(start, min(start + size, users)) for start in range(0, users, size))


def _doubles(scores: Scores, part: slice) -> Floats:
    return scores.block(part).numpy(force=True).astype(np.float64)


class Likelihood(NamedTuple):
    """Log-likelihood per user minus the penalty, its gradient (P), and its negative Hessian (P, P)."""

    value: float
    slope: Floats
    curve: Floats


class _ValidationScores:
    """All parts' scores of the validation users, recomputed in each pass because they may not fit in memory.

    Args:
        ranker: its weights standardise the scores of its parts.
        validation: the users.
    """

    def __init__(self, ranker: FusedRanker, validation: EvalBatch) -> None:
        self._scales = ranker.weights
        self._chunks = [(chunk, ranker.scored(chunk)) for chunk in validation.chunks()]

    def fitted(self) -> Floats:
        """Return the weights (P) that make the targets likeliest, none below 0."""
        return maximise(self._likelihood, np.ones(len(self._scales)))

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield standardised scores (P, B, N), a mask of seen items (B, N), and the targets (B,)."""
        for chunk, scores in self._chunks:
            for part in _slices(len(chunk.targets), scores.n_items * len(self._scales)):
                targets_B = torch.as_tensor(np.asarray(chunk.targets[part], np.int64))
                seen_BN = torch.zeros(len(targets_B), scores.n_items, dtype=torch.bool)
                for row, history in enumerate(chunk.histories[part]):
                    seen_BN[row, torch.as_tensor(np.asarray(history, np.int64))] = True
                seen_BN[torch.arange(len(targets_B)), targets_B] = False
                scaled = [scale * own_BN for own_BN, scale in zip(scores.parts(part), self._scales, strict=True)]
                scores_PBN = torch.stack(scaled)
                yield scores_PBN, seen_BN.to(scores_PBN.device), targets_B.to(scores_PBN.device)

    def _likelihood(self, weights: Floats) -> Likelihood:
        count = len(weights)
        value, users, slope, curve = 0.0, 0, np.zeros(count), np.zeros((count, count))
        for scores_PBN, seen_BN, targets_B in self._blocks():
            at_B = torch.arange(len(targets_B))
            logits_BN = torch.tensordot(torch.from_numpy(weights).float().to(scores_PBN.device), scores_PBN, 1)
            log_BN = logits_BN.masked_fill(seen_BN, -torch.inf).log_softmax(1)
            chance_BN = log_BN.exp()
            mean_PB = (scores_PBN * chance_BN).sum(2)
            apart_PBN = scores_PBN - mean_PB[:, :, None]
            value += float(log_BN[at_B, targets_B].double().sum())
            slope += apart_PBN[:, at_B, targets_B].double().sum(1).numpy(force=True)
            curve += ((apart_PBN * chance_BN).flatten(1) @ apart_PBN.flatten(1).T).double().numpy(force=True)
            users += len(targets_B)
        penalty = _PENALTY * float(weights @ weights) / 2
        return Likelihood(
            value / users - penalty, slope / users - _PENALTY * weights, curve / users + _PENALTY * np.eye(count)
        )


def maximise(likelihood: Callable[[Floats], Likelihood], weights: Floats) -> Floats:
    """Maximise a concave likelihood over weights that are not negative, by Newton's method.

    Each step goes to the best such weights of the likelihood's second-order expansion; one that overshoots is halved.
    """
    found = likelihood(weights)
    for _ in range(_STEPS):
        lower_PP = np.linalg.cholesky(found.curve)
        wanted = lower_PP.T @ weights + solve_triangular(lower_PP, found.slope, lower=True)
        step = nnls(lower_PP.T, wanted)[0] - weights
        while (then := likelihood(weights + step)).value < found.value and np.abs(step).max() > _CLOSE:
            step /= 2
        if then.value >= found.value:
            weights, found = weights + step, then
        if np.abs(step).max(initial=0.0) <= _CLOSE:
            break
    return weights
