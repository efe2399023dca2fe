"""Where a variant is good: metrics by history length and by the target's popularity, in equal-frequency buckets."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.ranking.intervals import mean_intervals
from rarec.ranking.metrics import metric_values

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
