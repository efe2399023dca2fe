"""From ranks to figures: each with n, its interval, and its protocol in its row."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.ranking.intervals import mean_intervals, paired_intervals
from rarec.ranking.metrics import metric_values

Ranks = Mapping[str, npt.NDArray[np.int64]]
PROTOCOL = "full"
"""The whole catalogue is ranked, the user's earlier items excluded, ties against the model."""


def metric_rows(ranks: Ranks, cutoffs: Iterable[int], *, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Rows {arm, metric, protocol, value, low, high, n}, with bootstrap 95% intervals over users."""
    cutoffs = list(cutoffs)
    rows = []
    for arm, arm_ranks in ranks.items():
        for metric, (value, low, high) in mean_intervals(metric_values(arm_ranks, cutoffs), resamples, seed).items():
            figures = {"value": value, "low": low, "high": high, "n": len(arm_ranks)}
            rows.append({"arm": arm, "metric": metric, "protocol": PROTOCOL, **figures})
    return rows


def comparison_rows(
    ranks: Ranks, pairs: Iterable[tuple[str, str]], cutoffs: Iterable[int], *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Rows {arm, baseline, metric, protocol, difference, low, high, n}: a paired bootstrap over the same users."""
    cutoffs = list(cutoffs)
    rows = []
    for arm, baseline in pairs:
        both = metric_values(ranks[arm], cutoffs), metric_values(ranks[baseline], cutoffs)
        for metric, (difference, low, high) in paired_intervals(*both, resamples, seed).items():
            figures = {"difference": difference, "low": low, "high": high, "n": len(ranks[arm])}
            rows.append({"arm": arm, "baseline": baseline, "metric": metric, "protocol": PROTOCOL, **figures})
    return rows


def pairs_of_interest(arms: Iterable[str], main: str) -> list[tuple[str, str]]:
    """What is compared: the main arm with every other, its fusions with rivals, probes with it, none with itself."""
    names = list(arms)
    plain = [(main, name) for name in names if name != main and "/" not in name and "+" not in name]
    fused = [(f"{main}+id", name) for name in ("id_only", "text_only+id", "readout+id", "input+id", main)]
    popular = [(f"{main}+id+popularity", f"{name}+popularity") for name in ("id_only", "text_only+id")]
    rival = [(main, "text_only+id")]
    probes = [(name, main) for name in names if name.startswith(f"{main}/")]
    text = [(name, "text_only") for name in names if name == f"{main}/permuted_ids"]
    pairs = plain + rival + fused + popular + probes + text
    turned = {(other, arm) for arm, other in fused}  # of the text alone, its rival's fusion is its own
    return [pair for pair in pairs if pair[0] != pair[1] and set(pair) <= set(names) and pair not in turned]
