"""Samples on disk and in motion: written, indexed, verified, and streamed in an order that is planned."""
