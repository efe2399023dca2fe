"""Ranks of every arm, their figures and intervals, probes, strata, and the report. Knows nothing of training."""
