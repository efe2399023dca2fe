"""Ranks in the full catalogue, their metrics and intervals. Knows vectors and ranks, nothing of models."""

from rarec.ranking.intervals import Interval, mean_interval, mean_intervals, paired_interval, paired_intervals
from rarec.ranking.metrics import metric_values
from rarec.ranking.rank import rank_shared, rank_targets, top_k

__all__ = [
    "Interval",
    "mean_interval",
    "mean_intervals",
    "metric_values",
    "paired_interval",
    "paired_intervals",
    "rank_shared",
    "rank_targets",
    "top_k",
]
