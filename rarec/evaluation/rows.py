"""From ranks to rows of results: metrics, paired comparisons and strata.

Every figure has n and a bootstrap 95% interval over users. Shape letters: U questions, one a user or several.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.evaluation.results import (
    ALL_CHEAP,
    CHEAP,
    FULL,
    FUSED,
    ID_ONLY,
    LEARNED,
    MINUS,
    ORACLE,
    REFITTED,
    SANITY_CHECKS,
    WITHOUT,
    baselines,
    cheap_suffix,
    is_external,
)
from rarec.ranking.metrics import Interval, mean_intervals, metric_values, paired_intervals

Ranks = Mapping[str, npt.NDArray[np.int64]]
Numbers = npt.NDArray[np.integer]
BUCKETS = 4
STRATA_CUTOFFS = (10, 100)


def metric_rows(
    ranks: Ranks, cutoffs: Sequence[int], *, resamples: int, seed: int, users: Numbers | None = None
) -> list[dict[str, Any]]:
    """Return the rows of metrics.json: {variant, metric, protocol, value, low, high, n}.

    Args:
        ranks: ranks of the same targets (U,), by row name.
        cutoffs: each K of HR@K and NDCG@K.
        resamples: number of bootstrap resamples of the users.
        seed: seed of the bootstrap.
        users: the user of each question (U,); None if each has one.
    """
    return [
        {"variant": variant, "metric": metric, "protocol": FULL, **_figures("value", estimate), "n": len(ranks_U)}
        for variant, ranks_U in ranks.items()
        for metric, estimate in mean_intervals(metric_values(ranks_U, cutoffs), resamples, seed, users).items()
    ]


def comparison_rows(
    ranks: Ranks,
    pairs: Iterable[tuple[str, str]],
    cutoffs: Sequence[int],
    *,
    resamples: int,
    seed: int,
    users: Numbers | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of comparisons.json: {variant, baseline, metric, protocol, difference, low, high, n, differing}.

    Differences are paired: each question's value of the variant minus that of the baseline.

    Args:
        ranks: ranks of the same targets (U,), by row name.
        pairs: row names of (variant, baseline).
        cutoffs: each K of HR@K and NDCG@K.
        resamples: number of bootstrap resamples of the users.
        seed: seed of the bootstrap.
        users: the user of each question (U,); None if each has one.
    """
    rows = []
    for variant, baseline in pairs:
        values, others = (metric_values(ranks[name], cutoffs) for name in (variant, baseline))
        for metric, estimate in paired_intervals(values, others, resamples, seed, users).items():
            names = {"variant": variant, "baseline": baseline, "metric": metric, "protocol": FULL}
            counts = {"n": len(ranks[variant]), "differing": int((values[metric] != others[metric]).sum())}
            rows.append({**names, **_figures("difference", estimate), **counts})
    return rows


def pairs_of_interest(variants: Iterable[str], main: str) -> list[tuple[str, str]]:
    """Return the pairs (variant, baseline) that are compared, each once.

    The main variant with every other; its fusions with other fusions, and with what they are without one part; learned
    orders with the fusions that they are of; refitted rows with each other and with what they were before; these
    and the ID model with the untrained baselines with external systems; sanity checks with the main variant; and, as
    any of them may be the best, every variant with the ID model and with text only + ID (without and with LoRA, as they
    are there), both with the untrained baselines where the variant has them.

    Args:
        variants: all row names.
        main: row name of the main variant.
    """
    names = list(variants)
    fused = main + FUSED
    whole = main + FUSED + CHEAP
    rivals = baselines(names)
    plain = [(main, name) for name in names if name != main and "/" not in name and "+" not in name]
    fusions = [(fused, name) for name in (*rivals, "readout+id", "input+id", main)]
    cheap = [(ID_ONLY + CHEAP, name) for name in (ID_ONLY, ALL_CHEAP, fused)] + [(whole, fused)]
    learned = [(name, name.removesuffix(LEARNED)) for name in names if name.endswith(LEARNED)]
    best = [(whole + suffix, rival + CHEAP + suffix) for suffix in ("", LEARNED) for rival in rivals]
    refit = [(row + REFITTED, rival + REFITTED) for row, rival in best]
    refit += [(name, name.removesuffix(REFITTED)) for name in names if name.endswith(REFITTED)]
    bounds = [(whole, name) for name in names if name.startswith(whole + WITHOUT)] + [(main + ORACLE, whole)]
    sanity_checks = [(name, main) for name in names if name.removeprefix(f"{main}/") in SANITY_CHECKS]
    text = [(f"{main}/permuted_ids", rivals[-1].removesuffix(FUSED)), ("prefix_only", "text_only")]
    tops = (fused, whole, whole + REFITTED, whole + LEARNED + REFITTED, ID_ONLY + CHEAP)
    external = [(row, name) for row in tops for name in names if is_external(name)]
    own = [name for name in names if "/" not in name and not is_external(name) and not name.startswith(ID_ONLY)]
    others = [(name, baseline + cheap_suffix(name)) for name in own for baseline in rivals]
    once: dict[frozenset[str], tuple[str, str]] = {}
    for pair in plain + fusions + others + cheap + learned + refit + bounds + sanity_checks + text + external:
        once.setdefault(frozenset(pair), pair)
    return [pair for both, pair in once.items() if len(both) == 2 and both <= set(names)]


def slots_and_rival(variants: Iterable[str], main: str) -> list[tuple[str, str]]:
    """Return the pair of rows whose difference is what the slots add, if both are there.

    They are fusions of the main variant and of text only, with LoRA if a run has that, both with the untrained
    baselines where the main variant has them.

    Args:
        variants: all row names.
        main: row name of the main variant.
    """
    names = list(variants)
    suffix = FUSED + CHEAP if main + FUSED + CHEAP in names else FUSED
    pair = main + suffix, baselines(names)[-1].removesuffix(FUSED) + suffix
    return [pair] if len({*pair}) == 2 and {*pair} <= set(names) else []


def bucket_labels(values_U: Numbers, buckets: int = BUCKETS) -> tuple[Numbers, list[str]]:
    """Divide whole numbers into buckets of about equal size. Equal values share a bucket; few values have one each.

    Returns:
        The bucket of each value (U,), and each bucket's label, such as `3-8`.
    """
    edges = np.unique(values_U)[1:]
    if len(edges) >= buckets:
        edges = np.unique(np.quantile(values_U, np.linspace(0, 1, buckets + 1)[1:-1], method="lower"))
    index_U = np.unique(np.searchsorted(edges, values_U, side="right"), return_inverse=True)[1]
    parts = [values_U[index_U == bucket] for bucket in range(index_U.max() + 1)]
    labels = [str(part.min()) if part.min() == part.max() else f"{part.min()}-{part.max()}" for part in parts]
    return index_U, labels


def strata_rows(
    ranks: Ranks,
    strata: Mapping[str, Numbers],
    pairs: Iterable[tuple[str, str]] = (),
    *,
    resamples: int,
    seed: int,
    users: Numbers | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of strata.json: {variant, stratum, bucket, order, metric, value, low, high, n}.

    Args:
        ranks: ranks of the same targets (U,), by row name.
        strata: a whole number for each question (U,), such as the length of the history, by the stratum's name.
        pairs: row names of (variant, baseline): their paired difference is the row `VARIANT - BASELINE`.
        resamples: number of bootstrap resamples of the users.
        seed: seed of the bootstrap.
        users: the user of each question (U,); None if each has one.
    """
    values = {variant: metric_values(ranks_U, STRATA_CUTOFFS) for variant, ranks_U in ranks.items()}
    for variant, baseline in pairs:
        own, others = values[variant], values[baseline]
        values[variant + MINUS + baseline] = {metric: own[metric] - others[metric] for metric in own}
    users_U = np.arange(len(next(iter(ranks.values())))) if users is None else users
    rows = []
    for stratum, values_U in strata.items():
        index_U, labels = bucket_labels(values_U)
        for variant, metrics in values.items():
            for order, label in enumerate(labels):
                place = {"variant": variant, "stratum": stratum, "bucket": label, "order": order}
                in_bucket = {metric: own_U[index_U == order] for metric, own_U in metrics.items()}
                for metric, estimate in mean_intervals(in_bucket, resamples, seed, users_U[index_U == order]).items():
                    figures = {**_figures("value", estimate), "n": len(in_bucket[metric])}
                    rows.append({**place, "metric": metric, **figures})
    return rows


def _figures(name: str, estimate: Interval) -> dict[str, float]:
    return {name: estimate.mean, "low": estimate.low, "high": estimate.high}
