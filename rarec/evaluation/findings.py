"""Paired comparisons and sanity checks in words: a claim needs the whole 95% interval on one side of zero."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from rarec.evaluation.labels import (
    CHEAP,
    FULL,
    FUSED,
    ID_ONLY,
    SANITY_CHECKS,
    WITHOUT,
    baselines,
    figure,
    interval,
    metric_title,
    part_title,
    primary_metric,
    variant_title,
)

Row = Mapping[str, Any]
Outcome = Literal["better", "worse", "inconclusive"]
MIN_DIFFERING = 6
"""Fewest users for whom the variants must differ: with fewer no sign test reaches 5%, though a bootstrap would."""


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
        """Read a row of comparisons.json. Older files do not hold `differing`: all users are assumed to differ."""
        known = {field.name: row[field.name] for field in fields(cls) if field.name in row}
        return cls(**{"differing": row["n"], **known})

    @property
    def swapped(self) -> "Finding":
        """The same comparison with variant and baseline exchanged."""
        return replace(
            self,
            variant=self.baseline,
            baseline=self.variant,
            difference=-self.difference,
            low=-self.high,
            high=-self.low,
        )

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
    def predicate(self) -> str:
        """The outcome as a predicate that the baseline's title completes: `is better than`."""
        if self.outcome == "inconclusive":
            return "is not significantly different from"
        return f"is {self.outcome} than"

    def clause(self, title: str | None = None) -> str:
        """Return the outcome as a clause without subject: `is better than the ID model`.

        Args:
            title: the baseline's title within a sentence; that of its row by default.
        """
        return f"{self.predicate} {title or variant_title(self.baseline)}"

    def evidence(self) -> str:
        """Return the numbers behind the outcome."""
        size, ends = figure(self.difference, signed=True), interval(self.low, self.high, signed=True)
        return f"paired difference in {metric_title(self.metric)} {size}, 95% interval {ends}, n={self.n:,}"


def find(comparisons: Iterable[Row], variant: str, baseline: str, metric: str) -> Finding | None:
    """Return the full-catalogue comparison of two variants, in either order, or None if there is none."""
    for row in comparisons:
        if row["metric"] != metric or row["protocol"] != FULL:
            continue
        if (row["variant"], row["baseline"]) == (variant, baseline):
            return Finding.of(row)
        if (row["variant"], row["baseline"]) == (baseline, variant):
            return Finding.of(row).swapped
    return None


@dataclass(frozen=True)
class PartWorth:
    """What one part of a late fusion is worth beside all the others.

    Attributes:
        title: the part's title.
        weight: of its standardised score; the weights of all parts sum to 1.
        findings: the whole fusion against the one without the part, with weights of its own, by metric.
    """

    title: str
    weight: float
    findings: Mapping[str, Finding]


def parts_worth(
    comparisons: Sequence[Row], fusions: Mapping[str, Mapping[str, Row]], variant: str, metrics: Sequence[str]
) -> list[PartWorth]:
    """Return the worth of each part of a variant's fusion with all that is cheap; nothing if there is none.

    Args:
        comparisons: rows of comparisons.json.
        fusions: contents of fusion.json.
        variant: row name of the variant.
        metrics: such as `ndcg@10`.
    """
    whole = variant + FUSED + CHEAP
    found = []
    for part, fitted in fusions.get(whole, {}).items():
        rest = ID_ONLY + CHEAP if part == variant else f"{whole}{WITHOUT}{part}"
        by_metric = {metric: find(comparisons, whole, rest, metric) for metric in metrics}
        known = {metric: finding for metric, finding in by_metric.items() if finding}
        found.append(PartWorth(part_title(part), fitted["share"], known))
    return found


@dataclass(frozen=True)
class SanityCheck:
    """The same trained variant, ranked again with one source of information destroyed.

    Attributes:
        title: what was destroyed.
        passed: True if the variant became significantly worse, as it must; None if it was not compared in pairs.
        text: the result in words.
    """

    title: str
    passed: bool | None
    text: str


def sanity_checks(metrics: Sequence[Row], comparisons: Sequence[Row], variant: str) -> list[SanityCheck]:
    """Judge every sanity check that was run for a variant.

    Args:
        metrics: rows of metrics.json.
        comparisons: rows of comparisons.json.
        variant: row name of the variant.
    """
    full = [row for row in metrics if row["protocol"] == FULL]
    primary = primary_metric(row["metric"] for row in full)
    values = {row["variant"]: row["value"] for row in full if row["metric"] == primary}
    names = [name for name in SANITY_CHECKS if f"{variant}/{name}" in values]
    return [_sanity_check(values, comparisons, variant, name, primary) for name in names]


def _sanity_check(
    values: Mapping[str, float], comparisons: Sequence[Row], variant: str, name: str, metric: str
) -> SanityCheck:
    row, title = f"{variant}/{name}", SANITY_CHECKS[name]
    finding = find(comparisons, row, variant, metric)
    text_only = _against_text(values, comparisons, row, metric) if name == "permuted_ids" else ""
    if finding is None:
        text = f"{metric_title(metric)} is {figure(values[row])}, but was not compared in pairs, so nothing is claimed."
        return SanityCheck(title, None, text + text_only)
    change = f", from {figure(values[variant])} to {figure(values[row])}" if variant in values else ""
    words = {
        "worse": "The variant gets worse, as it must",
        "inconclusive": "No significant loss: no evidence that the variant uses what was destroyed",
        "better": "The variant gets better, so it does not use what was destroyed as it should",
    }
    return SanityCheck(
        title, finding.outcome == "worse", f"{words[finding.outcome]} ({finding.evidence()}{change}).{text_only}"
    )


def _against_text(values: Mapping[str, float], comparisons: Sequence[Row], row: str, metric: str) -> str:
    """Compare the variant with permuted IDs to text only, with LoRA if the run has that."""
    text = baselines(values)[-1].removesuffix(FUSED)
    if text not in values:
        return ""
    finding = find(comparisons, row, text, metric)
    compared = f"; with permuted IDs, the variant {finding.clause('it')} ({finding.evidence()})" if finding else ""
    title = variant_title(text)
    return f" {title[0].upper()}{title[1:]} reaches {figure(values[text])}{compared}."
