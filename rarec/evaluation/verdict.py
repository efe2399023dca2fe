"""What the paired intervals allow one to say, in plain words, and nothing more (ours)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from rarec.evaluation.labels import (
    FULL,
    FUSED,
    HEADLINE,
    ID_ONLY,
    LATE_FUSION,
    POPULAR,
    SANITY_CHECKS,
    figure,
    interval,
    listed,
    metric_title,
    primary_metric,
    variant_title,
)

Row = Mapping[str, Any]
Outcome = Literal["beats", "loses", "open"]
DECIDING = 6
"""Of fewer users no sign test at 5% can say anything, but a bootstrap of them would."""
BASELINES = {ID_ONLY: "its own ID model", LATE_FUSION: "the late fusion of text and ID scores"}


@dataclass(frozen=True)
class Finding:
    """A paired comparison of two variants over the same test users, and how it reads.

    Attributes:
        variant: the one that is judged.
        baseline: its baseline.
        metric: such as `ndcg@10`.
        difference: mean over users of variant minus baseline.
        low: of the 95% interval of the difference.
        high: of the same.
        n: test users.
        differing: those for whom the two are not the same.
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
        """From a row of comparisons.json; older ones did not count who differs."""
        figures = {field.name: row[field.name] for field in fields(cls) if field.name in row}
        return cls(**{"differing": row["n"], **figures})

    @property
    def turned(self) -> "Finding":
        """The same with variant and baseline exchanged."""
        low, high = -self.high, -self.low
        return replace(
            self, variant=self.baseline, baseline=self.variant, difference=-self.difference, low=low, high=high
        )

    @property
    def outcome(self) -> Outcome:
        """`beats` only with the whole interval above zero, `loses` only with it below; else `open`.

        Also `open` where fewer than `DECIDING` users differ.
        """
        if self.differing < DECIDING:
            return "open"
        return "beats" if self.low > 0 else "loses" if self.high < 0 else "open"

    @property
    def reading(self) -> str:
        """The outcome in words."""
        words = {"beats": "beats", "loses": "loses to", "open": f"no difference can be claimed at n={self.n:,}"}
        return words[self.outcome]

    def clause(self, baseline: str) -> str:
        """`beats BASELINE`, `loses to BASELINE`, or that no difference can be claimed."""
        if self.outcome == "open":
            return f"against {baseline}, {self.reading}"
        return f"it {self.reading} {baseline}"

    def evidence(self) -> str:
        """The figures behind the clause."""
        size = figure(self.difference, signed=True)
        return f"paired difference in {metric_title(self.metric)} {size}, 95% interval {self._interval()}"

    def _interval(self) -> str:
        return interval(self.low, self.high, signed=True)


@dataclass(frozen=True)
class Verdict:
    """The report's first paragraph.

    Attributes:
        outcome: `beats` if the variant beats all of its baselines, `loses` if it loses to one, else `open`.
        headline: one sentence.
        sentences: the paragraph.
    """

    outcome: Outcome
    headline: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class SanityCheck:
    """A test of honesty: the same trained variant, ranked again with one source of information destroyed.

    Attributes:
        title: what was destroyed.
        passed: whether the variant became worse, as it must; None where that was not compared in pairs.
        text: the reading.
    """

    title: str
    passed: bool | None
    text: str


def find(comparisons: Iterable[Row], variant: str, baseline: str, metric: str) -> Finding | None:
    """The full-ranking comparison of two variants, whichever way round it was written; None if there is none."""
    for row in comparisons:
        if row["metric"] != metric or row["protocol"] != FULL:
            continue
        if (row["variant"], row["baseline"]) == (variant, baseline):
            return Finding.of(row)
        if (row["variant"], row["baseline"]) == (baseline, variant):
            return Finding.of(row).turned
    return None


def verdict(metrics: Sequence[Row], comparisons: Sequence[Row], variant: str, seed: int) -> Verdict:
    """Whether a variant beats its own ID model and the late fusion of text and ID scores.

    Args:
        metrics: rows of metrics.json.
        comparisons: rows of comparisons.json.
        variant: the variant that is exported.
        seed: of the run, named as the limit of what one run can show.
    """
    full = [row for row in metrics if row["protocol"] == FULL]
    primary = primary_metric(row["metric"] for row in full)
    own = next((row for row in full if row["variant"] == variant and row["metric"] == primary), None)
    title = variant_title(variant)
    if own is None:
        return Verdict("open", f"{title} was not evaluated: nothing can be claimed.", ())
    findings = {baseline: find(comparisons, variant, baseline, primary) for baseline in BASELINES}
    sentences = [
        f"{title} reaches {metric_title(primary)} {figure(own['value'])} (95% interval "
        f"{interval(own['low'], own['high'])}) over n={own['n']:,} test users, ranking the full catalogue.",
        *(_about(finding, BASELINES[baseline]) for baseline, finding in findings.items()),
        *_other_metrics(comparisons, variant, primary, findings),
        *_complement(comparisons, variant, primary),
        f"The intervals cover the draw of test users only: each variant was trained once, with seed {seed}, and the "
        "comparisons are not corrected for their number.",
    ]
    return Verdict(_overall(findings.values()), _headline(title, primary, findings), tuple(sentences))


def sanity_checks(metrics: Sequence[Row], comparisons: Sequence[Row], variant: str) -> list[SanityCheck]:
    """How a variant fared under each sanity check that was run."""
    full = [row for row in metrics if row["protocol"] == FULL]
    primary = primary_metric(row["metric"] for row in full)
    values = {row["variant"]: row["value"] for row in full if row["metric"] == primary}
    return [
        _sanity_check(values, comparisons, variant, name, primary)
        for name in SANITY_CHECKS
        if f"{variant}/{name}" in values
    ]


def _sanity_check(
    values: Mapping[str, float], comparisons: Sequence[Row], variant: str, name: str, metric: str
) -> SanityCheck:
    row = f"{variant}/{name}"
    finding = find(comparisons, row, variant, metric)
    landing = _landing(values, comparisons, row, metric) if name == "permuted_ids" else ""
    if finding is None:
        text = f"{metric_title(metric)} is {figure(values[row])}. It was not compared in pairs: nothing is claimed."
        return SanityCheck(SANITY_CHECKS[name], None, text + landing)
    before = f", from {figure(values[variant])} to {figure(values[row])}" if variant in values else ""
    said = {
        "loses": "The variant gets worse, as it must",
        "open": f"No loss can be claimed at n={finding.n:,}: the variant is not shown to use what was destroyed",
        "beats": "The variant gets better, as an honest one must not",
    }
    text = f"{said[finding.outcome]} ({finding.evidence()}{before})."
    return SanityCheck(SANITY_CHECKS[name], finding.outcome == "loses", text + landing)


def _landing(values: Mapping[str, float], comparisons: Sequence[Row], row: str, metric: str) -> str:
    """Where permuted IDs leave the variant, seen from text only."""
    if "text_only" not in values:
        return ""
    finding = find(comparisons, row, "text_only", metric)
    compared = f": {finding.clause('it')} ({finding.evidence()})" if finding else ""
    return f" Text only stands at {figure(values['text_only'])}{compared}."


def _about(finding: Finding | None, baseline: str) -> str:
    if finding is None:
        return f"It was not compared with {baseline}."
    clause = finding.clause(baseline)
    return f"{clause[0].upper()}{clause[1:]} ({finding.evidence()})."


def _readings(findings: Mapping[str, Finding | None]) -> str:
    """Clauses without a subject, baselines of one reading together: `beats A; against B, no difference can be claimed`."""
    baselines: dict[str, list[str]] = {}
    for baseline, finding in findings.items():
        baselines.setdefault(finding.reading if finding else "was not compared with", []).append(BASELINES[baseline])
    openings = {reading: reading.startswith("no difference") for reading in baselines}
    ordered = sorted(baselines.items(), key=lambda item: openings[item[0]])
    return "; ".join(f"against {listed(n)}, {r}" if openings[r] else f"{r} {listed(n)}" for r, n in ordered)


def _headline(title: str, metric: str, findings: Mapping[str, Finding | None]) -> str:
    said = _readings(findings)
    return f"On {metric_title(metric)}, {title}{': ' if said.startswith('against') else ' '}{said}."


def _overall(findings: Iterable[Finding | None]) -> Outcome:
    outcomes = {finding.outcome if finding else "open" for finding in findings}
    if "loses" in outcomes:
        return "loses"
    return "beats" if outcomes == {"beats"} else "open"


def _other_metrics(
    comparisons: Sequence[Row], variant: str, primary: str, findings: Mapping[str, Finding | None]
) -> list[str]:
    """One sentence: the other headline metrics read the same, or which of them read otherwise."""
    same, otherwise = [], []
    for metric in HEADLINE:
        there = {baseline: find(comparisons, variant, baseline, metric) for baseline in findings}
        known = {baseline: found for baseline, found in there.items() if found and findings[baseline]}
        if metric == primary or not known:
            continue
        firsts = {baseline: finding.outcome for baseline, finding in findings.items() if finding}
        differing = {baseline: found for baseline, found in known.items() if found.outcome != firsts[baseline]}
        if differing:
            said = _readings(differing)
            otherwise.append(f"on {metric_title(metric)}, {'' if said.startswith('against') else 'it '}{said}")
        else:
            same.append(metric_title(metric))
    agreeing = [f"{listed(same)} read{'s' if len(same) == 1 else ''} the same way"] if same else []
    opening = "but " if same else "other metrics read otherwise: "
    parts = agreeing + ([opening + "; ".join(otherwise)] if otherwise else [])
    sentence = ", ".join(parts)
    return [f"{sentence[0].upper()}{sentence[1:]}."] if parts else []


def _complement(comparisons: Sequence[Row], variant: str, metric: str) -> list[str]:
    """With the ID score added to both, and popularity: do the slots carry anything that late fusion lacks?"""
    carried = {
        "beats": "the slots carry something that adding the scores does not bring",
        "open": "the slots are not shown to carry anything that adding the scores does not bring",
        "loses": "beside these scores, the slots cost more than they bring",
    }
    sentences = []
    for added, opening in (("", "the ID score added to it"), (POPULAR, "the items' popularity added to both")):
        finding = find(comparisons, variant + FUSED + added, LATE_FUSION + added, metric)
        if finding is not None and variant + FUSED != LATE_FUSION:
            clause = finding.clause("the late fusion without slots")
            sentences.append(f"With {opening} as well, {clause} ({finding.evidence()}): {carried[finding.outcome]}.")
    return sentences
