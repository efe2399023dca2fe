"""Ranks of every variant; metrics with intervals, comparisons, sanity checks, diagnostics, the verdict. No training."""
