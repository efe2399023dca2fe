"""Logs to a prepared dataset: read, filter, number, order, split; written once, for every engine."""
