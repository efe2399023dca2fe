"""Histories to check a bundle with: it holds no user's own."""

from typing import Any

import numpy as np

from rarec.serving.parts import Parts


def sample_histories(parts: Parts, count: int, seed: int = 17) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Return histories to check a form with: 1 to 20 different items each, popular ones more often."""
    rng, counts_N = np.random.default_rng(seed), parts.bundle.catalogue.counts_N
    chances = np.sqrt(counts_N + 1.0)
    longest = min(20, len(counts_N) - 1)
    lengths = rng.integers(1, longest, count, endpoint=True)
    return [rng.choice(len(counts_N), length, replace=False, p=chances / chances.sum()) for length in lengths]
