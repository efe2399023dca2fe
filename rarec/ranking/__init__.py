"""Ranks in the full catalogue, their metrics and intervals. Knows vectors, tables and ranks, nothing of models."""
