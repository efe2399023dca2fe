"""The verdict of a run in words, the variant to deploy, and the sanity checks.

The question that the verdict answers first: does the main variant add to the untrained baselines? Both sides have the
ID model's score and that of every model that needs no training. A claim needs the whole 95% interval of a paired
difference on one side of zero.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from rarec.evaluation.labels import (
    CHEAP,
    FULL,
    FUSED,
    HEADLINE,
    ID_ONLY,
    SANITY_CHECKS,
    WITHOUT,
    baselines,
    cheap_suffix,
    figure,
    interval,
    is_external,
    listed,
    metric_title,
    part_title,
    primary_metric,
    sentence_case,
    title_in_sentence,
    variant_order,
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
        row = {"differing": row["n"], **row}
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

    def clause(self, baseline: str | None = None) -> str:
        """Return the outcome as a clause without subject: `is better than the ID model`.

        Args:
            baseline: the baseline's title within a sentence; that of its row by default.
        """
        return f"{_predicate(self)} {baseline or variant_title(self.baseline)}"

    @property
    def evidence(self) -> str:
        """The numbers behind the outcome."""
        size, ends = figure(self.difference, signed=True), interval(self.low, self.high, signed=True)
        return f"paired difference in {metric_title(self.metric)} {size}, 95% interval {ends}, n={self.n:,}"


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
    def full(self) -> list[Row]:
        """The rows of `metrics` under full ranking."""
        return [row for row in self.metrics if row["protocol"] == FULL]

    @cached_property
    def primary(self) -> str:
        """The primary metric."""
        return primary_metric(row["metric"] for row in self.full)

    @cached_property
    def reached(self) -> dict[str, Row]:
        """The rows of the primary metric on test users, by variant."""
        return _by_variant(self.metrics, self.primary)

    @property
    def values(self) -> dict[str, float]:
        """The primary metric on test users, by variant."""
        return {variant: row["value"] for variant, row in self.reached.items()}

    @cached_property
    def findings(self) -> list[Finding]:
        """The comparisons under full ranking."""
        return [Finding.of(row) for row in self.comparisons if row["protocol"] == FULL]

    def find(self, variant: str, baseline: str, metric: str | None = None) -> Finding | None:
        """Return the comparison of two variants, in the primary metric by default, or None if there is none."""
        for finding in self.findings:
            if finding.metric == (metric or self.primary) and {finding.variant, finding.baseline} == {
                variant,
                baseline,
            }:
                return finding if finding.variant == variant else finding.swapped
        return None

    def find_all(self, variant: str, others: Iterable[str], metric: str | None = None) -> Findings:
        """Return `find` for each of several baselines, but for the variant itself."""
        return {other: self.find(variant, other, metric) for other in others if other != variant}


def _by_variant(rows: Iterable[Row], metric: str) -> dict[str, Row]:
    return {row["variant"]: row for row in rows if (row["protocol"], row["metric"]) == (FULL, metric)}


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
    results: Results, fusions: Mapping[str, Mapping[str, Row]], variant: str, metrics: Sequence[str]
) -> list[PartWorth]:
    """Return the worth of each part of a variant's fusion with the untrained baselines; nothing if there is none.

    Args:
        results: the figures of the evaluation.
        fusions: contents of fusion.json.
        variant: row name of the variant.
        metrics: such as `ndcg@10`.
    """
    whole = variant + FUSED + CHEAP
    worth = []
    for part, fitted in fusions.get(whole, {}).items():
        rest = ID_ONLY + CHEAP if part == variant else f"{whole}{WITHOUT}{part}"
        findings = {metric: results.find(whole, rest, metric) for metric in metrics}
        known = {metric: finding for metric, finding in findings.items() if finding}
        worth.append(PartWorth(part_title(part), fitted["share"], known))
    return worth


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


_CHECKED = {
    "worse": "The variant gets worse, as it must",
    "inconclusive": "No significant loss: no evidence that the variant uses what was destroyed",
    "better": "The variant gets better, so it does not use what was destroyed as it should",
}


def sanity_checks(results: Results, variant: str) -> list[SanityCheck]:
    """Judge every sanity check that was run for a variant."""
    return [_sanity_check(results, variant, name) for name in SANITY_CHECKS if f"{variant}/{name}" in results.values]


def _sanity_check(results: Results, variant: str, name: str) -> SanityCheck:
    row, values, title = f"{variant}/{name}", results.values, SANITY_CHECKS[name]
    finding = results.find(row, variant)
    against_text = _against_text(results, row) if name == "permuted_ids" else ""
    if finding is None:
        value = f"{metric_title(results.primary)} is {figure(values[row])}"
        return SanityCheck(title, None, f"{value}, but was not compared in pairs, so nothing is claimed.{against_text}")
    change = f", from {figure(values[variant])} to {figure(values[row])}" if variant in values else ""
    text = f"{_CHECKED[finding.outcome]} ({finding.evidence}{change}).{against_text}"
    return SanityCheck(title, finding.outcome == "worse", text)


def _against_text(results: Results, row: str) -> str:
    """Compare the variant with permuted IDs to text only, with LoRA if the run has that."""
    text = baselines(results.values)[-1].removesuffix(FUSED)
    if text not in results.values:
        return ""
    finding = results.find(row, text)
    compared = f"; with permuted IDs, the variant {finding.clause('it')} ({finding.evidence})" if finding else ""
    return f" {sentence_case(variant_title(text))} reaches {figure(results.values[text])}{compared}."


@dataclass(frozen=True)
class BestVariant:
    """The variant to deploy: the row with the highest primary metric on validation users.

    Attributes:
        name: its row name, such as `per_layer+id`.
        metric: the primary metric.
        chosen: its value on validation users, by which it was chosen.
        value: its value on test users.
        findings: its paired comparison with each baseline other than itself. A row with the untrained baselines is
            compared with the baselines with them.
        better_outside: title and value of the best external row, if that is higher.
    """

    name: str
    metric: str
    chosen: float
    value: float
    findings: Findings
    better_outside: tuple[str, float] | None = None

    @property
    def title(self) -> str:
        """Its title in the report."""
        return variant_title(self.name)

    @property
    def outcome(self) -> Outcome:
        """`better` if it is significantly better than every baseline other than itself."""
        return _overall(self.findings)

    @property
    def sentence(self) -> str:
        """The best variant, its value, and the outcome of its comparisons, in words."""
        values = f"{metric_title(self.metric)} {figure(self.chosen)}; on test users {figure(self.value)}"
        compared = f": it {_clauses(self.findings)}" if self.findings else ""
        outside = ""
        if self.better_outside:
            title, value = self.better_outside
            outside = f" On test users, {title} is higher, at {figure(value)}."
        return f"{self.title} is best on validation users ({values}){compared}.{outside}"

    @property
    def advice(self) -> str:
        """The variant to deploy, in words, with the simplest baseline that is not significantly worse."""
        order = variant_order(self.name)  # rows of more parts come later
        as_good = [
            title_in_sentence(name)
            for name, finding in self.findings.items()
            if finding and finding.outcome == "inconclusive" and variant_order(name) < order
        ]
        simpler = f", or {as_good[0]}, which is simpler and not significantly worse" if as_good else ""
        return f"Deploy: {self.title}{simpler}."


def best_variant(results: Results) -> BestVariant | None:
    """Return the variant to deploy: the highest primary metric on validation users.

    Equal values go to the simpler variant.
    """
    values, validated = results.values, _by_variant(results.validation, results.primary)
    name = min(
        set(validated) & set(values), key=lambda row: (-validated[row]["value"], variant_order(row)), default=None
    )
    if name is None:
        return None
    findings = results.find_all(name, (baseline + cheap_suffix(name) for baseline in baselines(values)))
    outside = max(filter(is_external, values), key=values.__getitem__, default=name)
    better = (variant_title(outside), values[outside]) if values[outside] > values[name] else None
    return BestVariant(name, results.primary, validated[name]["value"], values[name], findings, better)


@dataclass(frozen=True)
class Verdict:
    """The report's first paragraph.

    Attributes:
        outcome: `better` if the judged row is better than every baseline, `worse` if it is worse than one of them.
        headline: one sentence about the main variant and the best one.
        sentences: the reasons, and the limits of what one run can show.
        best: the variant to deploy; None if nothing was evaluated.
    """

    outcome: Outcome
    headline: str
    sentences: tuple[str, ...]
    best: BestVariant | None = None


def verdict(results: Results, variant: str, seed: int) -> Verdict:
    """Judge what the main variant adds to the untrained baselines, and name the variant to deploy.

    The judged row is the variant's fusion with the untrained baselines; the variant alone where that was not evaluated.

    Args:
        results: the figures of the evaluation.
        variant: row name of the main variant.
        seed: seed of the run, named since one run cannot show how results vary between seeds.
    """
    best = best_variant(results)
    if variant not in results.values or best is None:
        return Verdict("inconclusive", f"{variant_title(variant)} was not evaluated.", (), best)
    rivals, whole = baselines(results.values), variant + FUSED + CHEAP
    judged = whole if whole in results.values else variant
    findings = results.find_all(judged, (rival + cheap_suffix(judged) for rival in rivals))
    sentences = [
        *(_reached(results, name) for name in dict.fromkeys((judged, variant))),
        *(_sentence(finding, baseline) for baseline, finding in findings.items()),
        *_other_metrics(results, judged, findings),
        *_beyond_late_fusion(results, variant, rivals[-1]),
        *([best.sentence] if best.name != judged or best.better_outside else []),
        f"The intervals cover the draw of test users only: each variant was trained once, with seed {seed}. "
        "The comparisons are not corrected for their number.",
    ]
    return Verdict(_overall(findings), _headline(variant, judged, findings, best), tuple(sentences), best)


def _headline(variant: str, judged: str, findings: Findings, best: BestVariant) -> str:
    title = variant_title(variant)
    compared = f"on {metric_title(best.metric)}, {variant_title(judged)} {_clauses(findings)}"
    if judged != variant:
        adds = {
            "better": f"{title} adds to the untrained baselines",
            "worse": f"{title} makes the untrained baselines worse",
            "inconclusive": f"No evidence that {title} adds to the untrained baselines",
        }
        compared = f"{adds[_overall(findings)]}: {compared}"
    about_best = "It is" if best.name == judged else f"{best.title} is"
    return f"{sentence_case(compared)}. {about_best} the best variant on validation users."


def _reached(results: Results, variant: str) -> str:
    row = results.reached[variant]
    return (
        f"{variant_title(variant)} reaches {metric_title(results.primary)} {figure(row['value'])} (95% interval "
        f"{interval(row['low'], row['high'])}) over n={row['n']:,} test users, ranking the full catalogue."
    )


def _sentence(finding: Finding | None, baseline: str) -> str:
    if finding is None:
        return f"It was not compared with {title_in_sentence(baseline)}."
    return f"It {finding.clause(title_in_sentence(baseline))} ({finding.evidence})."


def _other_metrics(results: Results, variant: str, findings: Findings) -> list[str]:
    """Say in one sentence which of the other headline metrics agree with the primary one, and which do not."""
    compared = {name: finding for name, finding in findings.items() if finding}
    same, otherwise = [], []
    for metric in HEADLINE:
        known = {name: finding for name, finding in results.find_all(variant, compared, metric).items() if finding}
        if metric == results.primary or not known:
            continue
        differing = {name: found for name, found in known.items() if found.outcome != compared[name].outcome}
        if differing:
            otherwise.append(f"on {metric_title(metric)} it {_clauses(differing)}")
        else:
            same.append(metric_title(metric))
    agreeing = [f"{listed(same)} agree{'s' if len(same) == 1 else ''}"] if same else []
    sentence = ", but ".join(agreeing + (["; ".join(otherwise)] if otherwise else []))
    return [f"{sentence_case(sentence)}."] if sentence else []


def _beyond_late_fusion(results: Results, variant: str, text: str) -> list[str]:
    """Compare both sides with the ID score alone added: what do the slots add to that of the text?"""
    finding = results.find(variant + FUSED, text)
    if finding is None:
        return []
    meaning = {
        "better": "the slots add information that the ID score does not have",
        "inconclusive": "no evidence that the slots add information beyond the ID score",
        "worse": "next to the ID score, the slots do harm",
    }
    return [f"{variant_title(finding.variant)} {finding.clause()} ({finding.evidence}): {meaning[finding.outcome]}."]


def _overall(findings: Findings) -> Outcome:
    outcomes = {finding.outcome if finding else "inconclusive" for finding in findings.values()}
    if "worse" in outcomes:
        return "worse"
    return "better" if outcomes == {"better"} else "inconclusive"


def _predicate(finding: Finding | None) -> str:
    """Return the outcome as a predicate that the baseline's title completes: `is better than`."""
    if finding is None:
        return "was not compared with"
    if finding.outcome == "inconclusive":
        return "is not significantly different from"
    return f"is {finding.outcome} than"


def _clauses(findings: Findings) -> str:
    """Join outcomes, grouping baselines by outcome: `is better than A and B, and is worse than C`."""
    names: dict[str, list[str]] = {}
    counts: dict[str, str] = {}
    for baseline, finding in findings.items():
        predicate = _predicate(finding)
        names.setdefault(predicate, []).append(title_in_sentence(baseline))
        if finding and finding.outcome == "inconclusive":
            counts[predicate] = f" (n={finding.n:,})"
    return ", and ".join(f"{words} {listed(titles)}{counts.get(words, '')}" for words, titles in names.items())
