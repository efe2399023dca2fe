"""Estimate the memory, traffic and hours of a training from models on the meta device; no weights are loaded."""
