"""Ranks in the full catalogue, their metrics and intervals. Knows vectors and ranks, nothing of models."""

from rarec.ranking.intervals import Interval, mean_interval, mean_intervals, paired_interval, paired_intervals
from rarec.ranking.metrics import metric_values, validation_metrics
from rarec.ranking.rank import Scores, VectorScores, best_scores, largest, rank_scores, rank_targets, top_k
from rarec.ranking.rankers import (
    CachedRanker,
    EvalBatch,
    FusedRanker,
    Ranker,
    VectorRanker,
    rank_users,
)

__all__ = [
    "CachedRanker",
    "EvalBatch",
    "FusedRanker",
    "Interval",
    "Ranker",
    "Scores",
    "VectorRanker",
    "VectorScores",
    "best_scores",
    "largest",
    "mean_interval",
    "mean_intervals",
    "metric_values",
    "paired_interval",
    "paired_intervals",
    "rank_scores",
    "rank_targets",
    "rank_users",
    "top_k",
    "validation_metrics",
]
