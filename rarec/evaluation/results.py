"""Rows of results, read back: the figures of an evaluation, and the outcome of each paired comparison.

Knows no ranks, and loads nothing heavy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from rarec.evaluation.labels import FULL, figure, interval, primary_metric

Row = Mapping[str, Any]
Outcome = Literal["better", "worse", "inconclusive"]
MIN_DIFFERING = 6
"""Fewest users for whom two variants must differ: with fewer no sign test reaches 5%, though a bootstrap would."""


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
