"""Logs to a prepared dataset, to selected samples, to shards, to a stream of batches. Knows no models."""
