"""Late fusion: the weighted sum of several models' scores (docs/method.md, section 7; our choice).

Late fusion of text and ID scores is the baseline that soft prompts must beat. The weights are fitted by maximum
likelihood on validation users: the weighted sum is the logit of a softmax over the items that a user has not seen. A
top-k metric would serve as well, but is nearly flat over the weights, so a few users would decide.

Shape letters: P parts, B users of a block, N catalogue, M candidates of a user.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls
from torch import Tensor

from rarec.ranking.rank import EvalBatch, Scores, largest
from rarec.ranking.rankers import FusedRanker, Ranker

COMPARED_USERS = 64
FLAT = 1e-5
"""Smallest spread of scores, relative to the largest score: a smaller spread is rounding, and counts as none."""
WHOLE = 100_000
"""Size of a catalogue up to which every item counts in the likelihood. Of a larger one, each user's candidates do."""
BEST, DRAWN = 100, 2_000
"""A user's candidates are the best items by each part, and some drawn at random that stand for all others."""
CHUNKS = 2
"""Number of chunks of users, spread over all of them, whose candidates are kept: 86 kB a user with seven parts."""
_SEED = 17
_BLOCK = 1 << 22
"""Number of scores in a block, those of all parts together."""
_PENALTY = 1e-4
"""Penalty on squared weights, per user: it keeps them finite if the targets are always first."""
_LEAST = 1e-5
"""Smallest eigenvalue of the curvature, scaled to a diagonal of 1: of nearly equal parts, it is rounding below that."""
_STEPS, _CLOSE = 50, 1e-3
"""Newton's method: the maximum number of steps, and the length of a step at which it has converged."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fusion:
    """A late fusion, and what went into it.

    Attributes:
        ranker: the fused model.
        parts: what it takes to score again, by part in the ranker's order: `share` (its weight relative to the spread
            of its scores: not negative, all sum to 1), `weight` and `slope` (see `FusedRanker`).
        flat: names of parts that give every item the same score, which adds nothing.
    """

    ranker: FusedRanker
    parts: dict[str, dict[str, float]]
    flat: list[str]


def fuse(parts: Mapping[str, Ranker], validation: EvalBatch) -> Fusion:
    """Fit the weights of several models' scores on the validation users.

    Where a part lacks an item, its score is predicted from that of the first part that never lacks one.

    Args:
        parts: by name.
        validation: users to fit the weights on; never the test users.
    """
    names = sorted(parts, key=lambda name: parts[name].lacking_N is not None)
    rankers = tuple(parts[name] for name in names)
    spreads_P, slopes = _compared(rankers, validation)
    plain = FusedRanker(rankers, tuple((1 / spreads_P).tolist()), slopes)
    fitted_P = maximise(ValidationLikelihood(plain, validation), np.ones(len(names)))
    shares_P = fitted_P / fitted_P.sum() if fitted_P.any() else np.full(len(names), 1 / len(names))
    weights_P = shares_P / spreads_P
    weights_P /= weights_P.max() or 1.0  # so that float32 can represent the sum, whatever the scales
    fused = replace(plain, weights=tuple(weights_P.tolist()))
    fitted = {
        name: {"share": share, "weight": weight, "slope": slope}
        for name, share, weight, slope in zip(names, shares_P.tolist(), fused.weights, slopes, strict=True)
    }
    return Fusion(fused, fitted, [name for name, spread in zip(names, spreads_P, strict=True) if np.isinf(spread)])


def _compared(rankers: tuple[Ranker, ...], batch: EvalBatch) -> tuple[Floats, tuple[float, ...]]:
    """Compare the parts' scores on a few users: their spreads, and their least-squares slopes over the first one's."""
    few = slice(COMPARED_USERS)
    some = EvalBatch(batch.user_rows[few], batch.histories[few], batch.targets[few])
    scored = [ranker.scored(some) for ranker in rankers]
    sums: list[list[Floats]] = [[] for _ in rankers]
    for block in user_blocks(len(some.targets), scored[0].n_items * len(rankers)):
        first_BN = _doubles(scored[0], block)
        for index, (ranker, scores) in enumerate(zip(rankers, scored, strict=True)):
            own_BN = _doubles(scores, block) if index else first_BN
            known = slice(None) if ranker.lacking_N is None else ~ranker.lacking_N
            sums[index].append(_sums(first_BN[:, known], own_BN[:, known]))
    spreads, slopes = [], []
    for part in sums:
        own_B, own_peak_B, first_B, first_peak_B, square_B, product_B = np.concatenate(part, axis=1)
        spreads.append(_spread(own_B, own_peak_B) or np.inf)  # a part that is constant adds nothing
        varies = _spread(first_B, first_peak_B) > 0
        slope = float(product_B.sum() / square_B.sum()) if varies else 0.0
        slopes.append(max(slope, 0.0) if rankers[0].lists else slope)  # to be listed never lowers a score
    return np.array(spreads), tuple(slopes)


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


def _doubles(scores: Scores, block: slice) -> Floats:
    return scores.block(block).numpy(force=True).astype(np.float64)


class Likelihood(NamedTuple):
    """Log-likelihood per user minus the penalty, its gradient (P), and its negative Hessian (P, P)."""

    value: float
    slope: Floats
    curve: Floats


@dataclass(frozen=True)
class Candidates:
    """The items that some users' targets compete with.

    Attributes:
        scores_PBM: standardised scores.
        stands_for_BM: log of the number of items that each one stands for; -inf for those that do not compete.
        targets_B: columns of the targets.
    """

    scores_PBM: Tensor
    stands_for_BM: Tensor
    targets_B: Tensor

    def thinned(self, drawn_S: Tensor) -> "Candidates":
        """Return the target, each part's best items, and the drawn ones, which stand for all that are not among these.

        Args:
            drawn_S: columns, drawn evenly and without repetition.
        """
        best = [largest(part_BM + self.stands_for_BM, BEST)[1] for part_BM in self.scores_PBM]
        best_BK = torch.cat([self.targets_B[:, None], *best], 1)
        times_BM = torch.zeros_like(self.stands_for_BM)
        times_BM.scatter_add_(1, best_BK, torch.ones_like(best_BK, dtype=times_BM.dtype))
        outside_BS = times_BM[:, drawn_S] == 0
        others_B1 = (times_BM == 0).sum(1, keepdim=True) / outside_BS.sum(1, keepdim=True)
        kept_BM = torch.cat([best_BK, drawn_S.expand(len(best_BK), -1)], 1)
        # an item that is among the best by several parts is there several times, each for its share
        stands_for_BM = self.stands_for_BM.gather(1, kept_BM)
        stands_for_BM += torch.cat([-times_BM.gather(1, best_BK).log(), (others_B1 * outside_BS).log()], 1)
        scores = [part_BM.gather(1, kept_BM) for part_BM in self.scores_PBM]
        return Candidates(torch.stack(scores), stands_for_BM, torch.zeros_like(self.targets_B))


class ValidationLikelihood:
    """The likelihood of the validation users' targets by the weights of the parts.

    The weighted sum of scores is the logit of a softmax over the items that a user has not seen. All scores may not fit
    in memory, so they are computed anew in each pass; those of the candidates of a large catalogue are kept instead.

    Args:
        ranker: its weights standardise the scores of its parts.
        validation: the users.
    """

    def __init__(self, ranker: FusedRanker, validation: EvalBatch) -> None:
        self._scales = ranker.weights
        chunks = list(validation.chunks())
        first = ranker.scored(chunks[0])
        n_items = first.n_items
        large = first.n_items > WHOLE
        chunks = chunks[:: -(-len(chunks) // CHUNKS)] if large else chunks
        self._chunks = [(chunks[0], first), *((chunk, ranker.scored(chunk)) for chunk in chunks[1:])]
        self._kept: list[Candidates] | None = None
        if large:
            drawn_S = torch.from_numpy(np.random.default_rng(_SEED).choice(n_items, DRAWN, replace=False))
            self._kept = [block.thinned(drawn_S.to(block.scores_PBM.device)) for block in self._blocks()]
            self._chunks = []

    def __call__(self, weights: Floats) -> Likelihood:
        """Return the likelihood of some weights (P)."""
        count = len(weights)
        value = 0.0
        users = 0
        slope = np.zeros(count)
        curve = np.zeros((count, count))
        for block in self._blocks() if self._kept is None else self._kept:
            scores_PBM = block.scores_PBM
            at_B = torch.arange(len(block.targets_B))
            logits_BM = torch.tensordot(torch.from_numpy(weights).float().to(scores_PBM.device), scores_PBM, 1)
            log_BM = (logits_BM + block.stands_for_BM).log_softmax(1)
            chance_BM = log_BM.exp()
            apart_PBM = scores_PBM - (scores_PBM * chance_BM).sum(2)[:, :, None]
            value += float(log_BM[at_B, block.targets_B].double().sum())
            slope += apart_PBM[:, at_B, block.targets_B].double().sum(1).numpy(force=True)
            curve += ((apart_PBM * chance_BM).flatten(1) @ apart_PBM.flatten(1).T).double().numpy(force=True)
            users += len(at_B)
        penalty = _PENALTY * float(weights @ weights) / 2
        return Likelihood(
            value / users - penalty, slope / users - _PENALTY * weights, curve / users + _PENALTY * np.eye(count)
        )

    def _blocks(self) -> Iterator[Candidates]:
        """Yield all items as candidates, some users at a time."""
        for chunk, scores in self._chunks:
            for part in user_blocks(len(chunk.targets), scores.n_items * len(self._scales)):
                targets_B = torch.as_tensor(np.asarray(chunk.targets[part], np.int64))
                stands_for_BN = torch.zeros(len(targets_B), scores.n_items)
                for row, history in enumerate(chunk.histories[part]):
                    stands_for_BN[row, torch.as_tensor(np.asarray(history, np.int64))] = -torch.inf
                stands_for_BN[torch.arange(len(targets_B)), targets_B] = 0.0
                scaled = [scale * own_BN for own_BN, scale in zip(scores.parts(part), self._scales, strict=True)]
                scores_PBN = torch.stack(scaled)
                device = scores_PBN.device
                yield Candidates(scores_PBN, stands_for_BN.to(device), targets_B.to(device))


def user_blocks(users: int, scores_each: int) -> Iterator[slice]:
    """Yield the users a block at a time, given how many scores one of them has."""
    size = max(_BLOCK // scores_each, 1)
    return (slice(start, min(start + size, users)) for start in range(0, users, size))


def maximise(likelihood: Callable[[Floats], Likelihood], weights: Floats) -> Floats:
    """Maximise a concave likelihood over weights that are not negative, by Newton's method.

    Each step goes to the best such weights of the likelihood's second-order expansion; one that overshoots is halved.
    """
    current = likelihood(weights)
    for _ in range(_STEPS):
        scale_P = np.sqrt(np.diag(current.curve))
        values_P, vectors_PP = np.linalg.eigh(current.curve / np.outer(scale_P, scale_P))
        lengths_P = np.sqrt(np.maximum(values_P, _LEAST))
        root_PP = scale_P[:, None] * vectors_PP * lengths_P  # times its transpose, it is the curvature
        wanted_P = root_PP.T @ weights + vectors_PP.T @ (current.slope / scale_P) / lengths_P
        step = nnls(root_PP.T, wanted_P)[0] - weights
        while (stepped := likelihood(weights + step)).value < current.value and np.abs(step).max() > _CLOSE:
            step /= 2
        if stepped.value >= current.value:
            weights = weights + step
            current = stepped
        if np.abs(step).max(initial=0.0) <= _CLOSE:
            break
    return weights
