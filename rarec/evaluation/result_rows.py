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
    """Rows {variant, metric, protocol, value, low, high, n}, with bootstrap 95% intervals over users."""
    cutoffs = list(cutoffs)
    rows = []
    for variant, variant_ranks in ranks.items():
        for metric, (value, low, high) in mean_intervals(
            metric_values(variant_ranks, cutoffs), resamples, seed
        ).items():
            figures = {"value": value, "low": low, "high": high, "n": len(variant_ranks)}
            rows.append({"variant": variant, "metric": metric, "protocol": PROTOCOL, **figures})
    return rows


def comparison_rows(
    ranks: Ranks, pairs: Iterable[tuple[str, str]], cutoffs: Iterable[int], *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Rows {variant, baseline, metric, protocol, difference, low, high, n, differing}: a paired bootstrap over users.

    `differing` counts those for whom the two are not the same.
    """
    cutoffs = list(cutoffs)
    rows = []
    for variant, baseline in pairs:
        ours, theirs = metric_values(ranks[variant], cutoffs), metric_values(ranks[baseline], cutoffs)
        for metric, (difference, low, high) in paired_intervals(ours, theirs, resamples, seed).items():
            differing = int((ours[metric] != theirs[metric]).sum())
            figures = {
                "difference": difference,
                "low": low,
                "high": high,
                "n": len(ranks[variant]),
                "differing": differing,
            }
            rows.append({"variant": variant, "baseline": baseline, "metric": metric, "protocol": PROTOCOL, **figures})
    return rows


def pairs_of_interest(variants: Iterable[str], main: str) -> list[tuple[str, str]]:
    """What is compared, each pair once: the main variant with all others, its fusions with baselines, sanity checks with it.

    And every fusion with that of the text alone; what the text gains by itself, over the ID model and by instructions.
    """
    names = list(variants)
    plain = [(main, name) for name in names if name != main and "/" not in name and "+" not in name]
    baseline = [(main, "text_only+id")] if main != "text_only" else []
    fused = [(f"{main}+id", name) for name in ("id_only", "text_only+id", "readout+id", "input+id", main)]
    others = [(name, "text_only+id") for name in names if name.endswith("+id")]
    popular = [(f"{main}+id+popularity", f"{name}+popularity") for name in ("id_only", "text_only+id")]
    sanity_checks = [(name, main) for name in names if name.startswith(f"{main}/")]
    text = [(name, "text_only") for name in names if name == f"{main}/permuted_ids"]
    gains = [("text_only+id", "id_only"), ("prefix_only", "text_only")]
    once: dict[frozenset[str], tuple[str, str]] = {}
    for pair in plain + baseline + fused + others + gains + popular + sanity_checks + text:
        once.setdefault(frozenset(pair), pair)
    return [pair for both, pair in once.items() if len(both) == 2 and both <= set(names)]


Numbers = npt.NDArray[np.integer]
BUCKETS = 4


def bucket_labels(values: Numbers, buckets: int = BUCKETS) -> tuple[Numbers, list[str]]:
    """Equal-frequency buckets of whole numbers; equal values share a bucket, and few values have one each.

    Returns:
        The bucket of each value, and labels such as "3-8" by bucket.
    """
    edges = np.unique(values)[1:]
    if len(edges) >= buckets:
        edges = np.unique(np.quantile(values, np.linspace(0, 1, buckets + 1)[1:-1], method="lower"))
    index = np.unique(np.searchsorted(edges, values, side="right"), return_inverse=True)[1]
    parts = [values[index == bucket] for bucket in range(index.max() + 1)]
    labels = [str(part.min()) if part.min() == part.max() else f"{part.min()}-{part.max()}" for part in parts]
    return index, labels


def strata_rows(
    ranks: Mapping[str, npt.NDArray[np.int64]],
    strata: Mapping[str, Numbers],
    *,
    resamples: int,
    seed: int,
    cutoffs: tuple[int, ...] = (10, 100),
) -> list[dict[str, Any]]:
    """Rows {variant, stratum, bucket, order, metric, value, low, high, n} for every variant, stratum and bucket.

    Args:
        ranks: of the same users, by variant.
        strata: a number for each user, by the stratum's name.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        cutoffs: K of the metrics.
    """
    rows = []
    for stratum, values in strata.items():
        index, labels = bucket_labels(values)
        for variant, variant_ranks in ranks.items():
            for order, label in enumerate(labels):
                chosen = variant_ranks[index == order]
                intervals = mean_intervals(metric_values(chosen, cutoffs), resamples, seed)
                for metric, (value, low, high) in intervals.items():
                    place = {"variant": variant, "stratum": stratum, "bucket": label, "order": order}
                    rows.append({**place, "metric": metric, "value": value, "low": low, "high": high, "n": len(chosen)})
    return rows
