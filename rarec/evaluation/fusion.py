"""Late fusion: the weighted sum of several models' scores (docs/method.md, section 7; our choice).

Late fusion of text and ID scores is the baseline that soft prompts must beat. The weights are fitted by maximum
likelihood on validation users: the weighted sum is the logit of a softmax over the items that a user has not seen. A
top-k metric would serve as well, but is nearly flat over the weights, so a few users would decide.

Shape letters: P parts or terms, B users of a block, N catalogue, M candidates of a user.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls
from torch import Tensor

from rarec.neighbours.scores import NEW
from rarec.ranking.rank import EvalBatch, largest, seen_pairs
from rarec.ranking.rankers import FusedRanker, Ranker, UnmetRanker, VectorRanker, new_items

COMPARED_USERS = 64
FLAT = 1e-5
"""Smallest spread of scores, relative to the largest score: a smaller spread is rounding, and counts as none."""
WHOLE = 100_000
"""Size of a catalogue up to which every item counts in the likelihood. Of a larger one, each user's candidates do."""
BEST, DRAWN = 100, 2_000
"""A user's candidates are the best items by each part, and some drawn at random that stand for all others."""
CHUNKS = 2
"""Number of chunks of users, spread over all of them, whose candidates are kept: 0.2 MB a user with eight parts."""
_SEED = 17
_BLOCK = 1 << 22
"""Number of scores in a block, those of all parts together."""
_PENALTY = 1e-4
"""Penalty on squared weights, per user: it keeps them finite if the targets are always first."""
_LEAST = 1e-5
"""Smallest eigenvalue of the curvature, scaled to a diagonal of 1: of nearly equal parts, it is rounding below that."""
_STEPS, _CLOSE = 50, 1e-3
"""Newton's method: the maximum number of steps, and the length of a step at which it has converged."""
FEWEST_NEW, TENTH = 50, 10
"""Targets that are new items, at least, to fit weights of new items; of fewer, every tenth item counts as new."""
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.integer]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fusion:
    """A late fusion, and what went into it.

    Attributes:
        ranker: the fused model.
        parts: what it takes to score again, by part in the ranker's order: `share` (its weight relative to the spread
            of its scores: not negative, all sum to 1), `weight` and `new_weight` (see `FusedRanker`).
        flat: names of parts that give every item the same score, which adds nothing.
    """

    ranker: FusedRanker
    parts: dict[str, dict[str, float]]
    flat: list[str]


def fuse(parts: Mapping[str, Ranker], validation: EvalBatch, counts_N: Counts) -> Fusion:
    """Fit the weights of several models' scores on the validation users.

    New items have weights of their own: of the models that know something of them, and a constant. If the validation
    users took too few to fit these, every tenth item by popularity counts as new.

    Args:
        parts: by name.
        validation: users to fit the weights on; never the test users.
        counts_N: training interactions of each item.
    """
    new_N = new_items(counts_N, parts.values())
    few = np.count_nonzero(new_N[validation.targets]) < FEWEST_NEW
    rows = pretended(counts_N) if few else np.empty(0, np.int64)
    taught_N = new_N.copy()
    taught_N[rows] = True
    hidden_N = new_N if few else None  # perhaps nobody could take them yet
    unmet = *(_unmet(part, rows) for part in parts.values()), VectorRanker.of_new(taught_N)
    ones = (1.0,) * len(unmet)
    plain = FusedRanker(unmet, ones, ones, taught_N, hidden_N)
    fitted = _fitted(plain, validation)
    weights, new_weights = tuple(fitted.weights_P.tolist()), tuple(fitted.new_weights_P.tolist())
    taught = [replace(plain, weights=weights, new_weights=new_weights)]
    rankers = *parts.values(), VectorRanker.of_new(new_N)
    if few:
        taught.append(FusedRanker(rankers, weights, new_weights, new_N, new_N))
    each = zip([*parts, NEW], fitted.shares_P.tolist(), weights, new_weights, strict=True)
    return Fusion(
        FusedRanker(rankers, weights, new_weights, new_N, taught=tuple(taught)),
        {name: {"share": share, "weight": weight, "new_weight": new} for name, share, weight, new in each},
        [name for name, spread in zip(parts, fitted.spreads_P, strict=False) if np.isinf(spread)],
    )


def pretended(counts_N: Counts) -> Rows:
    """Return every tenth of the items that occur in training, in the order of their popularity."""
    order = np.argsort(-counts_N, kind="stable")
    return np.sort(order[: np.count_nonzero(counts_N)][TENTH // 2 :: TENTH])


def _unmet(part: Ranker, rows: Rows) -> Ranker:
    """Return a model as it is if no training has met some items; one that knows no new item is as it was."""
    vectors_BZ = part.unmet(rows) if part.knows_new and len(rows) else None
    return part if vectors_BZ is None else UnmetRanker(part, rows, vectors_BZ)


class _Fitted(NamedTuple):
    """See `Fusion.parts`; the last part is a constant of new items. The spreads are those of the scores."""

    spreads_P: Floats
    shares_P: Floats
    weights_P: Floats
    new_weights_P: Floats


def _fitted(ranker: FusedRanker, validation: EvalBatch) -> _Fitted:
    *models, _ = ranker.parts
    new_N, last = ranker.new_N, len(models)
    spreads_P = np.array([*(_spread(model, validation) or np.inf for model in models), 1.0])  # a flat part adds nothing
    knowing = [part for part, model in enumerate(models) if model.knows_new]
    known = [(part, ~new_N / spreads_P[part]) for part in range(last)]
    of_new = [(part, new_N / spreads_P[part]) for part in knowing]
    constant = [(last, sign * new_N) for sign in (1.0, -1.0)]  # since no weight is negative
    terms = [*known, *of_new, *constant]
    fitted = maximise(ValidationLikelihood(ranker, validation, terms), np.ones(len(terms)))
    known_P = np.append(fitted[:last] if fitted[:last].any() else np.ones(last), 0.0)
    new_P = np.zeros(last + 1)
    new_P[[*knowing, last]] = [*fitted[last:-2], fitted[-2] - fitted[-1]]
    scale = np.abs([known_P / spreads_P, new_P / spreads_P]).max() or 1.0  # so that float32 can represent the sum
    return _Fitted(spreads_P, known_P / known_P.sum(), known_P / spreads_P / scale, new_P / spreads_P / scale)


def _spread(ranker: Ranker, batch: EvalBatch) -> float:
    """Return the standard deviation over items of a few users' scores; 0 if all are equal up to rounding."""
    scores = ranker.scored(batch.part(slice(COMPARED_USERS)))
    deviations, peak = [], 0.0
    for block in user_blocks(scores.n_users, scores.n_items):
        own_BN = scores.block(block).numpy(force=True).astype(np.float64)
        deviations.append(own_BN.std(1))
        peak = max(peak, float(np.abs(own_BN).max()))
    spread = float(np.concatenate(deviations).mean())
    return spread if spread > FLAT * peak else 0.0


class Likelihood(NamedTuple):
    """Log-likelihood per user minus the penalty, its gradient (P), and its negative Hessian (P, P)."""

    value: float
    slope: Floats
    curve: Floats


@dataclass(frozen=True)
class Candidates:
    """The items that some users' targets compete with.

    Attributes:
        scores_PBM: the terms that have weights; see `ValidationLikelihood`.
        stands_for_BM: log of the number of items that each one stands for; -inf for those that do not compete.
        targets_B: columns of the targets.
    """

    scores_PBM: Tensor
    stands_for_BM: Tensor
    targets_B: Tensor

    def thinned(self, drawn_S: Tensor) -> "Candidates":
        """Return the target, each term's best items, and the drawn ones, which stand for all that are not among these.

        Args:
            drawn_S: columns, drawn evenly and without repetition.
        """
        # 0 is the score of an item that a term does not concern
        concerned = (part_BM.where(part_BM != 0, -torch.inf) for part_BM in self.scores_PBM)
        best = [largest(part_BM + self.stands_for_BM, BEST)[1] for part_BM in concerned]
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
        ranker: has the parts.
        validation: the users.
        terms: what weights are fitted of: the index of a part, and the factors of its scores, (N,).
    """

    def __init__(
        self, ranker: FusedRanker, validation: EvalBatch, terms: Sequence[tuple[int, npt.NDArray[Any]]]
    ) -> None:
        self._terms = [(part, torch.from_numpy(factors_N).float()) for part, factors_N in terms]
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
            for part in user_blocks(len(chunk.targets), scores.n_items * len(self._terms)):
                targets_B = torch.as_tensor(np.asarray(chunk.targets[part], np.int64))
                stands_for_BN = torch.zeros(len(targets_B), scores.n_items)
                if scores.hidden_N is not None:
                    stands_for_BN[:, torch.from_numpy(scores.hidden_N)] = -torch.inf
                stands_for_BN[seen_pairs(chunk.seen[part])] = -torch.inf
                stands_for_BN[torch.arange(len(targets_B)), targets_B] = 0.0
                parts = list(scores.parts(part))
                scores_PBN = torch.stack([factors_N.to(parts[at].device) * parts[at] for at, factors_N in self._terms])
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
