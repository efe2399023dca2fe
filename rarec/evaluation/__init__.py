"""Ranks of every variant, their figures and intervals, sanity checks, strata, and the report. Knows nothing of training."""
