"""Ranks in the full catalogue, their metrics and intervals. Knows vectors, tables and ranks, nothing of models."""

from rarec.ranking.rank import EvalBatch, Scores
from rarec.ranking.rankers import CachedRanker, FusedRanker, NeighbourRanker, Ranker, VectorRanker, rank_users

__all__ = [
    "CachedRanker",
    "EvalBatch",
    "FusedRanker",
    "NeighbourRanker",
    "Ranker",
    "Scores",
    "VectorRanker",
    "rank_users",
]
