"""Ranks in the full catalogue, their metrics and intervals. Knows vectors and ranks, nothing of models."""

from rarec.ranking.rank import Scores
from rarec.ranking.rankers import CachedRanker, EvalBatch, FusedRanker, Ranker, VectorRanker, rank_users

__all__ = ["CachedRanker", "EvalBatch", "FusedRanker", "Ranker", "Scores", "VectorRanker", "rank_users"]
