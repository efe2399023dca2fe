"""Bundles of a trained variant: written, checked against what they are used with, and loaded. No training."""
