"""Ranking metrics with one relevant item per user, computed from its rank. Shape letters: U users."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SELECTED_BY = "ndcg@100"
"""The validation metric that selects the epoch of an ID model and the step of a variant. It covers the first hundred
ranks, over which HR@100 is reported, and still weighs the first ten most (our choice; papers mostly use NDCG@10)."""
SELECTION_CUTOFFS = (10, 100)
"""Cutoffs of the metrics that a validation reports."""


def hit_rate(ranks_U: npt.NDArray[np.int64], cutoff: int) -> Floats:
    """Return HR@K of each user: 1 if the target is among the first K, else 0. With one target it equals Recall@K."""
    return (ranks_U <= cutoff).astype(np.float64)


def ndcg(ranks_U: npt.NDArray[np.int64], cutoff: int) -> Floats:
    """Return NDCG@K of each user: 1 / log2(1 + rank) within the first K, else 0 (the ideal DCG of one target is 1)."""
    return np.where(ranks_U <= cutoff, 1 / np.log2(1.0 + ranks_U), 0.0)


def mrr(ranks_U: npt.NDArray[np.int64]) -> Floats:
    """Return the reciprocal rank of each user, over the full catalogue, without a cutoff."""
    return 1.0 / ranks_U


def metric_values(ranks_U: npt.NDArray[np.int64], cutoffs: Iterable[int]) -> dict[str, Floats]:
    """Return per-user values of every metric; the mean over users is the metric's figure.

    Args:
        ranks_U: ranks, 1 the best, as `rank_targets` returns them.
        cutoffs: each K of HR@K and NDCG@K.

    Returns:
        `hr@K` and `ndcg@K` for each K, then `mrr`; each of shape (U,).

    Raises:
        ValueError: a rank is below 1.
    """
    ranks_U = np.asarray(ranks_U, dtype=np.int64)
    if (ranks_U < 1).any():
        raise ValueError("ranks start at 1")
    cutoffs = tuple(cutoffs)
    values = {f"hr@{cutoff}": hit_rate(ranks_U, cutoff) for cutoff in cutoffs}
    values |= {f"ndcg@{cutoff}": ndcg(ranks_U, cutoff) for cutoff in cutoffs}
    return values | {"mrr": mrr(ranks_U)}


def validation_metrics(ranks_U: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return the means over validation users of HR and NDCG at the selection cutoffs, and MRR."""
    return {name: float(values.mean()) for name, values in metric_values(ranks_U, SELECTION_CUTOFFS).items()}
