"""Rows of results: computed from ranks (metrics, paired comparisons, strata), and read back.

Every figure has n and a bootstrap 95% interval over users. Shape letters: U users.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rarec.evaluation.labels import (
    ALL_CHEAP,
    CHEAP,
    FULL,
    FUSED,
    ID_ONLY,
    MINUS,
    ORACLE,
    SANITY_CHECKS,
    WITHOUT,
    baselines,
    cheap_suffix,
    figure,
    interval,
    is_external,
    primary_metric,
)
from rarec.ranking.metrics import Interval, mean_intervals, metric_values, paired_intervals

Row = Mapping[str, Any]
Ranks = Mapping[str, npt.NDArray[np.int64]]
Numbers = npt.NDArray[np.integer]
Outcome = Literal["better", "worse", "inconclusive"]
BUCKETS = 4
STRATA_CUTOFFS = (10, 100)
MIN_DIFFERING = 6
"""Fewest users for whom two variants must differ: with fewer no sign test reaches 5%, though a bootstrap would."""


def metric_rows(ranks: Ranks, cutoffs: Sequence[int], *, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Return the rows of metrics.json: {variant, metric, protocol, value, low, high, n}.

    Args:
        ranks: ranks of the same users' targets (U,), by row name.
        cutoffs: each K of HR@K and NDCG@K.
        resamples: number of bootstrap resamples of the users.
        seed: seed of the bootstrap.
    """
    return [
        {"variant": variant, "metric": metric, "protocol": FULL, **_figures("value", estimate), "n": len(ranks_U)}
        for variant, ranks_U in ranks.items()
        for metric, estimate in mean_intervals(metric_values(ranks_U, cutoffs), resamples, seed).items()
    ]


def comparison_rows(
    ranks: Ranks, pairs: Iterable[tuple[str, str]], cutoffs: Sequence[int], *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Return the rows of comparisons.json: {variant, baseline, metric, protocol, difference, low, high, n, differing}.

    Differences are paired: each user's value of the variant minus that of the baseline.

    Args:
        ranks: ranks of the same users' targets (U,), by row name.
        pairs: row names of (variant, baseline).
        cutoffs: each K of HR@K and NDCG@K.
        resamples: number of bootstrap resamples of the users.
        seed: seed of the bootstrap.
    """
    rows = []
    for variant, baseline in pairs:
        values, others = (metric_values(ranks[name], cutoffs) for name in (variant, baseline))
        for metric, estimate in paired_intervals(values, others, resamples, seed).items():
            names = {"variant": variant, "baseline": baseline, "metric": metric, "protocol": FULL}
            counts = {"n": len(ranks[variant]), "differing": int((values[metric] != others[metric]).sum())}
            rows.append({**names, **_figures("difference", estimate), **counts})
    return rows


def pairs_of_interest(variants: Iterable[str], main: str) -> list[tuple[str, str]]:
    """Return the pairs (variant, baseline) that are compared, each once.

    The main variant with every other; its fusions with other fusions, and with what they are without one part; these
    and the ID model with the untrained baselines with external systems; sanity checks with the main variant; and, as
    any of them may be the best, every variant with the ID model and with text only + ID (without and with LoRA, as they
    are there), both with the untrained baselines where the variant has them.

    Args:
        variants: all row names.
        main: row name of the main variant.
    """
    names = list(variants)
    fused, whole = main + FUSED, main + FUSED + CHEAP
    rivals = baselines(names)
    plain = [(main, name) for name in names if name != main and "/" not in name and "+" not in name]
    fusions = [(fused, name) for name in (*rivals, "readout+id", "input+id", main)]
    cheap = [(ID_ONLY + CHEAP, name) for name in (ID_ONLY, ALL_CHEAP, fused)] + [(whole, fused)]
    bounds = [(whole, name) for name in names if name.startswith(whole + WITHOUT)] + [(main + ORACLE, whole)]
    sanity_checks = [(name, main) for name in names if name.removeprefix(f"{main}/") in SANITY_CHECKS]
    text = [(f"{main}/permuted_ids", rivals[-1].removesuffix(FUSED)), ("prefix_only", "text_only")]
    external = [(row, name) for row in (fused, whole, ID_ONLY + CHEAP) for name in names if is_external(name)]
    own = [name for name in names if "/" not in name and not is_external(name) and not name.startswith(ID_ONLY)]
    others = [(name, baseline + cheap_suffix(name)) for name in own for baseline in rivals]
    once: dict[frozenset[str], tuple[str, str]] = {}
    for pair in plain + fusions + others + cheap + bounds + sanity_checks + text + external:
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
) -> list[dict[str, Any]]:
    """Return the rows of strata.json: {variant, stratum, bucket, order, metric, value, low, high, n}.

    Args:
        ranks: ranks of the same users' targets (U,), by row name.
        strata: a whole number for each user (U,), such as the length of the history, by the stratum's name.
        pairs: row names of (variant, baseline): their paired difference is the row `VARIANT - BASELINE`.
        resamples: number of bootstrap resamples of the users.
        seed: seed of the bootstrap.
    """
    values = {variant: metric_values(ranks_U, STRATA_CUTOFFS) for variant, ranks_U in ranks.items()}
    for variant, baseline in pairs:
        own, others = values[variant], values[baseline]
        values[variant + MINUS + baseline] = {metric: own[metric] - others[metric] for metric in own}
    rows = []
    for stratum, values_U in strata.items():
        index_U, labels = bucket_labels(values_U)
        for variant, metrics in values.items():
            for order, label in enumerate(labels):
                place = {"variant": variant, "stratum": stratum, "bucket": label, "order": order}
                in_bucket = {metric: own_U[index_U == order] for metric, own_U in metrics.items()}
                for metric, estimate in mean_intervals(in_bucket, resamples, seed).items():
                    figures = {**_figures("value", estimate), "n": len(in_bucket[metric])}
                    rows.append({**place, "metric": metric, **figures})
    return rows


def _figures(name: str, estimate: Interval) -> dict[str, float]:
    return {name: estimate.mean, "low": estimate.low, "high": estimate.high}


@dataclass(frozen=True)
class Finding:
    """A paired comparison of two variants on the same test users.

    Attributes:
        variant: row name of the variant that is judged.
        baseline: row name of what it is compared with.
        metric: such as `ndcg@10`.
        difference: mean over users of variant minus baseline.
        low: lower end of the difference's 95% interval.
        high: upper end.
        n: number of test users.
        differing: number of users for whom the two values are not equal.
    """

    variant: str
    baseline: str
    metric: str
    difference: float
    low: float
    high: float
    n: int
    differing: int

    @classmethod
    def of(cls, row: Row) -> "Finding":
        """Read a row of comparisons.json."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @property
    def swapped(self) -> "Finding":
        """The same comparison with variant and baseline exchanged."""
        names = self.baseline, self.variant, self.metric
        return Finding(*names, -self.difference, -self.high, -self.low, self.n, self.differing)

    @property
    def outcome(self) -> Outcome:
        """`better` or `worse` if the whole interval is above or below zero, else `inconclusive`.

        Also `inconclusive` where fewer than `MIN_DIFFERING` users differ.
        """
        if self.differing < MIN_DIFFERING:
            return "inconclusive"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "inconclusive"

    @property
    def reading(self) -> str:
        """The outcome in words."""
        return f"no significant difference (n={self.n:,})" if self.outcome == "inconclusive" else self.outcome

    @property
    def evidence(self) -> str:
        """The numbers behind the outcome."""
        size, ends = figure(self.difference, signed=True), interval(self.low, self.high, signed=True)
        return f"paired difference in {self.metric.upper()} {size}, 95% interval {ends}, n={self.n:,}"


Findings = Mapping[str, Finding | None]
"""Comparisons of one variant by baseline; None where the two were not compared."""


@dataclass(frozen=True)
class Results:
    """The figures of an evaluation.

    Attributes:
        metrics: rows of metrics.json.
        comparisons: rows of comparisons.json.
        validation: rows of validation.json, in the form of `metrics`: the rows that can be deployed.
    """

    metrics: Sequence[Row]
    comparisons: Sequence[Row] = ()
    validation: Sequence[Row] = ()

    @cached_property
    def cells(self) -> dict[tuple[str, str], Row]:
        """The rows of `metrics` under full ranking, by variant and metric."""
        return {(row["variant"], row["metric"]): row for row in self.metrics if row["protocol"] == FULL}

    @cached_property
    def primary(self) -> str:
        """The primary metric."""
        return primary_metric(metric for _, metric in self.cells)

    @cached_property
    def values(self) -> dict[str, float]:
        """The primary metric on test users, by variant."""
        return {variant: row["value"] for (variant, metric), row in self.cells.items() if metric == self.primary}

    @cached_property
    def findings(self) -> list[Finding]:
        """The comparisons under full ranking."""
        return [Finding.of(row) for row in self.comparisons if row["protocol"] == FULL]

    @cached_property
    def _by_pair(self) -> dict[tuple[str, str, str], Finding]:
        both = [finding for own in self.findings for finding in (own, own.swapped)]
        return {(finding.variant, finding.baseline, finding.metric): finding for finding in both}

    def find(self, variant: str, baseline: str, metric: str | None = None) -> Finding | None:
        """Return the comparison of two variants, in the primary metric by default, or None if there is none."""
        return self._by_pair.get((variant, baseline, metric or self.primary))

    def find_all(self, variant: str, others: Iterable[str], metric: str | None = None) -> Findings:
        """Return `find` for each of several baselines, but for the variant itself."""
        return {other: self.find(variant, other, metric) for other in others if other != variant}
