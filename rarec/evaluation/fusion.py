"""Late fusion: the weighted sum of several models' scores (docs/method.md, section 7; our choice).

Late fusion of text and ID scores is the baseline that soft prompts must beat. The weights are fitted by maximum
likelihood on validation users: the weighted sum is the logit of a softmax over the items that a user has not seen. A
top-k metric would serve as well, but is nearly flat over the weights, so a few users would decide.

Shape letters: P parts, B users of a block, N catalogue.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rarec.evaluation.likelihood import Floats, ValidationLikelihood, user_blocks
from rarec.ranking import EvalBatch, FusedRanker, Ranker, Scores

COMPARED_USERS = 64
FLAT = 1e-5
"""Smallest spread of scores, relative to the largest score: a smaller spread is rounding, and counts as none."""


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

    Where a part lacks an item, its score is predicted from that of the first part that never lacks one.

    Args:
        parts: by name.
        validation: users to fit the weights on; never the test users.
    """
    names = sorted(parts, key=lambda name: parts[name].lacking_N is not None)
    rankers = tuple(parts[name] for name in names)
    spreads, slopes = _compared(rankers, validation)
    plain = FusedRanker(rankers, tuple(1 / spread for spread in spreads), slopes)
    fitted = ValidationLikelihood(plain, validation).best_weights()
    fitted = fitted / fitted.sum() if fitted.any() else np.full(len(names), 1 / len(names))
    weights = [float(share / spread) for share, spread in zip(fitted, spreads, strict=True)]
    largest = max(weights) or 1.0  # so that float32 can represent the sum, whatever the scales
    fused = replace(plain, weights=tuple(weight / largest for weight in weights))
    shares = dict(zip(names, map(float, fitted), strict=True))
    flat = tuple(name for name, spread in zip(names, spreads, strict=True) if np.isinf(spread))
    return Fusion(fused, tuple(names), {name: shares[name] for name in parts}, flat)


def _compared(rankers: tuple[Ranker, ...], batch: EvalBatch) -> tuple[tuple[float, ...], tuple[float, ...]]:
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


def _doubles(scores: Scores, block: slice) -> Floats:
    return scores.block(block).numpy(force=True).astype(np.float64)
