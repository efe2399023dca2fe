"""Compute the figures of finished runs: means over seeds, their intervals, and paired differences.

A figure of several seeds is the mean over users of each user's mean over the seeds. The bootstrap resamples users, so
an interval covers the choice of users and not the choice of seeds.

Shape letters: U users.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from rarec.cluster.definition import SweepRun
from rarec.errors import UserError
from rarec.evaluation.results import FUSED, HEADLINE, ID_ONLY, SANITY_GROUP, variant_group, variant_order
from rarec.ranking.metrics import Floats, mean_intervals, metric_values

HITS = "hr@100"
"""The metric of the tables by stratum and by who hits."""
CUTOFFS = (10, 100)
"""The cutoffs of the headline's metrics."""
DECIMALS = 9
PLACE_BITS = np.uint64(16)
"""The last bits of a user's digest: questions of one user differ in them alone."""
COLUMNS = 1024
"""Values that are resampled together; bounds memory."""

Ranks: TypeAlias = pd.DataFrame
"""Ranks of one seed: a row for each question, the column `target`, and a column of ranks for each variant."""
Summary = dict[str, Any]
Metrics = Mapping[str, Floats]
"""metric -> (U,)"""
Triples = list[float]
"""Mean, low and high of each metric of `HEADLINE`, one after the other."""


@dataclass(frozen=True)
class SeedMeans:
    """The metrics of each question under each variant of a run, averaged over seeds.

    Attributes:
        values: of each variant, for the same questions in the same order.
        users: digests of users and places, in that order.
        targets: the targets, in that order.
        left_out: number of questions that only some of the seeds ranked.
    """

    values: Mapping[str, Metrics]
    users: pd.Index
    targets: pd.Series
    left_out: int

    @classmethod
    def of(cls, seeds: Mapping[str, Ranks]) -> "SeedMeans":
        """Average the ranks of seeds, by their labels, over the users and variants that all of them have.

        Raises:
            UserError: a user's target differs between seeds, or no user was ranked under all of them.
        """
        first_label, *labels = seeds
        users = seeds[first_label].index
        for label in labels:
            users = users[users.isin(seeds[label].index)]
        targets = seeds[first_label]["target"][users]
        for label in labels:
            if (seeds[label]["target"][users] != targets).any():
                problem = f"{label}: a user has another target than in {first_label}"
                raise UserError(problem, "seeds of one run must be evaluated on the same split")
        if users.empty:
            raise UserError(f"no user was ranked in all of {', '.join(seeds)}", "leave evaluate.users out")
        values = {
            variant: _mean([metric_values(own[variant][users].to_numpy(np.int64), CUTOFFS) for own in seeds.values()])
            for variant in seeds[first_label].columns.drop("target")
            if all(variant in ranks for ranks in seeds.values())
        }
        every = set().union(*(ranks.index for ranks in seeds.values()))
        return cls(values, users, targets, len(every) - len(users))


def _mean(seeds: Sequence[Metrics]) -> dict[str, Floats]:
    return {metric: np.mean([values[metric] for values in seeds], axis=0) for metric in seeds[0]}


def run_figures(means: SeedMeans, run: SweepRun) -> Summary:
    """Return the figures of every variant of a run, and the paired differences of all of them."""
    names = sorted(means.values, key=variant_order)
    pairs = {f"{a} - {b}": _difference(means.values[a], means.values[b]) for a, b in combinations(names, 2)}
    variants = {name: {metric: means.values[name][metric] for metric in HEADLINE} for name in names}
    figures, differences = (_intervals(rows, run, means.users) for rows in (variants, pairs))
    return {"figures": figures, "differences": differences}


def compare(means: SeedMeans, others: SeedMeans, run: SweepRun) -> Summary:
    """Compare the variants of two runs over the users that both have, or say why not.

    A variant that both have is compared with itself; where one run lacks a variant of the other, all pairs of the same
    kind (alone, with ID scores, with popularity) are compared.
    """
    pairs = list(_pairs(list(means.values), list(others.values)))
    if not pairs:
        return {"not_compared": "no variants of the same kind"}
    rows = np.flatnonzero(means.users.isin(others.users))
    other_rows = others.users.get_indexer(means.users[rows])
    if not len(rows):
        return {"not_compared": "no test user in common"}
    if (means.targets.to_numpy()[rows] != others.targets.to_numpy()[other_rows]).any():
        return {"not_compared": "other test targets"}
    differences = {f"{a} - {b}": _difference(means.values[a], others.values[b], rows, other_rows) for a, b in pairs}
    return {"users": len(rows), "differences": _intervals(differences, run, means.users[rows])}


def _pairs(own: Sequence[str], others: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of variants of two runs that are compared."""
    for variant in sorted(own, key=variant_order):
        for other in sorted(others, key=variant_order):
            same_kind = variant_group(variant) == variant_group(other) != SANITY_GROUP
            if same_kind and (variant == other or variant not in others or other not in own):
                yield variant, other


def _difference(
    values: Metrics, others: Metrics, rows: Any = slice(None), other_rows: Any = slice(None)
) -> dict[str, Floats]:
    return {metric: values[metric][rows] - others[metric][other_rows] for metric in HEADLINE}


def _intervals(values: Mapping[str, Metrics], run: SweepRun, users: pd.Index) -> dict[str, Triples]:
    """Return the intervals of many rows at once, all of the same questions and on the same resamples of users."""
    users_U = users.to_numpy(np.uint64) >> PLACE_BITS
    columns = {(name, metric): column for name, metrics in values.items() for metric, column in metrics.items()}
    keys = list(columns)
    triples: dict[str, Triples] = {name: [] for name in values}
    for start in range(0, len(keys), COLUMNS):
        some = {str(key): columns[key] for key in keys[start : start + COLUMNS]}
        intervals = mean_intervals(some, run.config.evaluate.resamples, run.seed, users_U)
        for name, metric in keys[start : start + COLUMNS]:
            triples[name] += rounded(intervals[str((name, metric))])
    return triples


def rounded(values: Any) -> Triples:
    """Round values for a file; there is no negative zero."""
    return [round(value, DECIMALS) + 0.0 for value in values]


def strata(rows: Sequence[Mapping[str, Any]]) -> Summary:
    """Return {stratum: {"users": n, variant: [mean, low, high]}} of `HITS`, without sanity checks."""
    by_stratum: dict[str, Summary] = {}
    for row in rows:
        if row["metric"] == HITS and variant_group(row["variant"]) != SANITY_GROUP:
            cells = by_stratum.setdefault(f"{row['stratum']} {row['bucket']}", {"users": row["n"]})
            cells[row["variant"]] = rounded(row[name] for name in ("value", "low", "high"))
    return by_stratum


def hits(ranks: Ranks) -> dict[str, list[float]]:
    """Return, for each variant with a fusion, the shares of users that the ID model or the variant hits.

    Ten numbers: hit by either, both, the ID model alone, the variant alone and neither; each followed by the share
    that the fusion hits as well.
    """
    hit = {variant: values[HITS] > 0 for variant, values in SeedMeans.of({"": ranks}).values.items()}
    rows = {}
    for variant in sorted((name for name in hit if name + FUSED in hit and ID_ONLY in hit), key=variant_order):
        ids, own, fused = hit[ID_ONLY], hit[variant], hit[variant + FUSED]
        parts = (ids | own, ids & own, ids & ~own, own & ~ids, ~(ids | own))
        rows[variant] = rounded(float(share.mean()) for part in parts for share in (part, fused & part))
    return rows
