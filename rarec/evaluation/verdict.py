"""The verdict of a run in words, and the variant to deploy: no claim goes beyond the paired intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rarec.config import RunConfig
from rarec.evaluation.findings import Finding, Outcome, Row, find
from rarec.evaluation.labels import (
    CHEAP,
    FULL,
    FUSED,
    HEADLINE,
    ID_ONLY,
    LATE_FUSION,
    POPULAR,
    base_variant,
    cheap_suffix,
    figure,
    interval,
    is_external,
    listed,
    metric_title,
    primary_metric,
    title_in_sentence,
    variant_order,
    variant_title,
)
from rarec.evaluation.run_files import TrainingRecord

BASELINES = (ID_ONLY, LATE_FUSION)
"""The two baselines of every verdict: the ID model, and the language model's score without slots plus the ID score."""
Findings = Mapping[str, Finding | None]


@dataclass(frozen=True)
class BestVariant:
    """The variant to deploy: the row with the highest primary metric.

    Attributes:
        name: its row name, such as `per_layer+id`.
        metric: the primary metric.
        value: its value.
        findings: its paired comparison with each baseline other than itself; None where they were not compared. A row
            with all that is cheap is compared with the baselines with it.
        better_outside: title and value of the best external row, if that is higher.
    """

    name: str
    metric: str
    value: float
    findings: Findings
    better_outside: tuple[str, float] | None = None

    @property
    def title(self) -> str:
        """Its title in the report."""
        return variant_title(self.name)

    @property
    def is_baseline(self) -> bool:
        """True if no slots and no ID vectors enter the language model: RA-Rec adds nothing here."""
        return base_variant(self.name) in (ID_ONLY, "text_only")

    @property
    def better_than_id(self) -> bool:
        """True if it is significantly better than the ID model."""
        return self._is_better_than(ID_ONLY)

    @property
    def better_than_text_and_id(self) -> bool:
        """True if it is significantly better than text only + ID."""
        return self._is_better_than(LATE_FUSION)

    @property
    def outcome(self) -> Outcome:
        """`better` if it is significantly better than every baseline other than itself."""
        outcomes = {finding.outcome if finding else "inconclusive" for finding in self.findings.values()}
        if "worse" in outcomes:
            return "worse"
        return "better" if outcomes == {"better"} else "inconclusive"

    @property
    def sentence(self) -> str:
        """The best variant, its value, and the outcome of its comparisons, in words."""
        opening = f"{self.title} is the best variant ({metric_title(self.metric)} {figure(self.value)})"
        outside = ""
        if self.better_outside:
            title, value = self.better_outside
            outside = f" {title} is higher, at {figure(value)}."
        return f"{opening}{': it ' + _clauses(self.findings) if self.findings else ''}.{outside}"

    @property
    def advice(self) -> str:
        """The variant to deploy, in words, with the simplest baseline that is not significantly worse."""
        as_good = [
            title_in_sentence(name)
            for name, finding in self.findings.items()
            if finding and finding.outcome == "inconclusive"
        ]
        simpler = f", or {as_good[0]}, which is simpler and not significantly worse" if as_good else ""
        return f"Deploy: {self.title}{simpler}."

    def _is_better_than(self, baseline: str) -> bool:
        return any(
            finding is not None and finding.outcome == "better"
            for name, finding in self.findings.items()
            if name.removesuffix(cheap_suffix(name)) == baseline
        )


@dataclass(frozen=True)
class Verdict:
    """The report's first paragraph.

    Attributes:
        outcome: `better` if the best variant uses slots or ID vectors and is better than both baselines; else the
            exported variant's: `worse` if it is worse than a baseline, `better` if it is better than both.
        headline: one sentence about the exported variant and the best one.
        sentences: the reasons, and the limits of what one run can show.
        best: the variant to deploy; None if nothing was evaluated.
    """

    outcome: Outcome
    headline: str
    sentences: tuple[str, ...]
    best: BestVariant | None = None


def best_variant(metrics: Sequence[Row], comparisons: Sequence[Row]) -> BestVariant | None:
    """Return the variant to deploy: the highest primary metric, without sanity checks and external systems.

    Equal values go to the simpler variant.

    Args:
        metrics: rows of metrics.json.
        comparisons: rows of comparisons.json.
    """
    full = [row for row in metrics if row["protocol"] == FULL and "/" not in row["variant"]]
    primary = primary_metric(row["metric"] for row in full)
    ranked = [row for row in full if row["metric"] == primary]
    ranked.sort(key=lambda row: (-row["value"], variant_order(row["variant"])))
    best = next((row for row in ranked if not is_external(row["variant"])), None)
    if best is None:
        return None
    name, value = best["variant"], best["value"]
    cheap = cheap_suffix(name)
    baselines = [baseline + cheap for baseline in BASELINES if baseline + cheap != name]
    findings = {baseline: find(comparisons, name, baseline, primary) for baseline in baselines}
    above = ranked[0] if ranked[0]["value"] > value else None
    return BestVariant(
        name, primary, value, findings, (variant_title(above["variant"]), above["value"]) if above else None
    )


def verdict(metrics: Sequence[Row], comparisons: Sequence[Row], variant: str, seed: int) -> Verdict:
    """Judge the exported variant against the ID model and text only + ID, and name the variant to deploy.

    Args:
        metrics: rows of metrics.json.
        comparisons: rows of comparisons.json.
        variant: row name of the exported variant.
        seed: seed of the run, named since one run cannot show how results vary between seeds.
    """
    full = [row for row in metrics if row["protocol"] == FULL]
    primary = primary_metric(row["metric"] for row in full)
    own = next((row for row in full if row["variant"] == variant and row["metric"] == primary), None)
    title, best = variant_title(variant), best_variant(metrics, comparisons)
    if own is None or best is None:
        return Verdict("inconclusive", f"{title} was not evaluated.", (), best)
    findings = {name: find(comparisons, variant, name, primary) for name in BASELINES if name != variant}
    sentences = [
        f"{title} reaches {metric_title(primary)} {figure(own['value'])} (95% interval "
        f"{interval(own['low'], own['high'])}) over n={own['n']:,} test users, ranking the full catalogue.",
        *(_sentence(finding, baseline) for baseline, finding in findings.items()),
        *_other_metrics(comparisons, variant, primary, findings),
        *_beyond_late_fusion(comparisons, variant, primary),
        *([best.sentence] if best.name != variant or best.better_outside else []),
        f"The intervals cover the draw of test users only: each variant was trained once, with seed {seed}. "
        "The comparisons are not corrected for their number, and the highest of several values is slightly too high.",
    ]
    return Verdict(_overall(findings, best), _headline(title, primary, findings, best, variant), tuple(sentences), best)


def still_improving(training: Mapping[str, TrainingRecord], config: RunConfig) -> str | None:
    """Name the variants whose last validation was their best, and the field that ended their training, or return None.

    Args:
        training: trainings by variant.
        config: the run's configuration.
    """
    names = [name for name in config.variants if name in training and training[name].still_improving]
    if not names:
        return None
    limit, steps = config.train.max_steps, max(training[name].done["step"] for name in names)
    field = f"train.max_steps (now {limit})" if limit == steps else f"train.epochs (now {config.train.epochs})"
    return f"Still improving at the last step: {listed([variant_title(name) for name in names])}. Raise {field}."


def _headline(title: str, metric: str, findings: Findings, best: BestVariant, variant: str) -> str:
    about_best = "It is the best variant." if best.name == variant else f"{best.title} is the best variant."
    return f"On {metric_title(metric)}, {title} {_clauses(findings)}. {about_best}"


def _overall(findings: Findings, best: BestVariant) -> Outcome:
    if best.outcome == "better" and not best.is_baseline:
        return "better"
    outcomes = {finding.outcome if finding else "inconclusive" for finding in findings.values()}
    if "worse" in outcomes:
        return "worse"
    return "better" if outcomes == {"better"} else "inconclusive"


def _sentence(finding: Finding | None, baseline: str) -> str:
    if finding is None:
        return f"It was not compared with {title_in_sentence(baseline)}."
    return f"It {finding.clause(title_in_sentence(baseline))} ({finding.evidence()})."


def _clauses(findings: Findings) -> str:
    """Join outcomes, grouping baselines by outcome: `is better than A and B, and is worse than C`."""
    baselines: dict[str, list[str]] = {}
    counts: dict[str, str] = {}
    for baseline, finding in findings.items():
        predicate = finding.predicate if finding else "was not compared with"
        baselines.setdefault(predicate, []).append(title_in_sentence(baseline))
        if finding and finding.outcome == "inconclusive":
            counts[predicate] = f" (n={finding.n:,})"
    return ", and ".join(f"{words} {listed(names)}{counts.get(words, '')}" for words, names in baselines.items())


def _other_metrics(comparisons: Sequence[Row], variant: str, primary: str, findings: Findings) -> list[str]:
    """Say in one sentence which of the other headline metrics agree with the primary one, and which do not."""
    same, otherwise = [], []
    for metric in HEADLINE:
        there = {name: find(comparisons, variant, name, metric) for name, finding in findings.items() if finding}
        known = {name: finding for name, finding in there.items() if finding}
        if metric == primary or not known:
            continue
        differing = {
            name: finding
            for name, finding in known.items()
            if (first := findings[name]) is not None and finding.outcome != first.outcome
        }
        if differing:
            otherwise.append(f"on {metric_title(metric)} it {_clauses(differing)}")
        else:
            same.append(metric_title(metric))
    agreeing = [f"{listed(same)} agree{'s' if len(same) == 1 else ''}"] if same else []
    sentence = ", but ".join(agreeing + (["; ".join(otherwise)] if otherwise else []))
    return [f"{sentence[0].upper()}{sentence[1:]}."] if sentence else []


def _beyond_late_fusion(comparisons: Sequence[Row], variant: str, metric: str) -> list[str]:
    """Compare both sides with the ID score added, and with all that is cheap added as well: what do the slots add?"""
    meaning = {
        "better": "the slots add information that the added scores do not have",
        "inconclusive": "no evidence that the slots add information beyond the added scores",
        "worse": "next to the added scores, the slots do harm",
    }
    if variant + FUSED == LATE_FUSION:
        return []
    sentences = []
    for added in ("", POPULAR, CHEAP):
        finding = find(comparisons, variant + FUSED + added, LATE_FUSION + added, metric)
        if finding is not None:
            title = variant_title(finding.variant)
            sentences.append(f"{title} {finding.clause()} ({finding.evidence()}): {meaning[finding.outcome]}.")
    return sentences
