"""From logs to a prepared dataset: read, filter, number, order, split. Written once, for all engines."""
