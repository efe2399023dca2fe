"""Ranks of every variant; metrics with intervals, comparisons, sanity checks, diagnostics; the report. No training."""
