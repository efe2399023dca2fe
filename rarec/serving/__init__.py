"""The bundle that a user takes away: written, checked against what it is used with, and loaded. Knows no training."""
