"""Histories to check a bundle with: it holds no user's own."""

from typing import Any

import numpy as np

from rarec.bundle.parts import Parts


def sample_histories(parts: Parts, count: int, seed: int = 17) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Return histories to check a form with: 1 to 20 different items each, popular ones more often."""
    rng, counts_N = np.random.default_rng(seed), parts.bundle.catalogue.counts_N
    chances = np.sqrt(counts_N + 1.0)
    longest = min(20, len(counts_N) - 1)
    lengths = rng.integers(1, longest, count, endpoint=True)
    return [rng.choice(len(counts_N), length, replace=False, p=chances / chances.sum()) for length in lengths]


def sample_user(parts: Parts, rng: np.random.Generator, length: int = 5) -> list[int]:
    """Return the history of a user who might be: a popular item, then neighbours of those before."""
    counts_N, tables = parts.bundle.catalogue.counts_N, parts.bundle.tables_there
    chances = np.sqrt(counts_N + 1.0)
    rows = [int(rng.choice(len(counts_N), p=chances / chances.sum()))]
    near = parts.bundle.neighbours("cooccurrence" if "cooccurrence" in tables else tables[0]) if tables else None
    while len(rows) < min(length, len(counts_N)):
        own = near.getrow(int(rng.choice(rows))) if near is not None else None
        found = own.indices[np.argsort(-own.data)[:10]] if own is not None else np.empty(0, np.int64)
        new = np.setdiff1d(found if rng.random() < 0.9 else np.arange(len(counts_N)), rows)
        rows += [int(rng.choice(new))] if len(new) else []
    return rows
