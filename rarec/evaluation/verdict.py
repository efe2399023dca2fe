"""The verdict of a run in words, and the variant to deploy: no claim goes beyond the paired intervals.

The question that it answers first: does the main variant add to all that is cheap? Both sides have the ID model's
score and every model that needs no training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rarec.config import RunConfig
from rarec.evaluation.findings import Finding, Outcome, Row, find
from rarec.evaluation.labels import (
    CHEAP,
    FULL,
    FUSED,
    HEADLINE,
    baselines,
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

Findings = Mapping[str, Finding | None]


@dataclass(frozen=True)
class BestVariant:
    """The variant to deploy: the row with the highest primary metric on validation users.

    Attributes:
        name: its row name, such as `per_layer+id`.
        metric: the primary metric.
        chosen: its value on validation users, by which it was chosen.
        value: its value on test users.
        findings: its paired comparison with each baseline other than itself; None where they were not compared. A row
            with all that is cheap is compared with the baselines with it.
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
        opening = f"{self.title} is best on validation users ({values})"
        outside = ""
        if self.better_outside:
            title, value = self.better_outside
            outside = f" On test users, {title} is higher, at {figure(value)}."
        return f"{opening}{': it ' + _clauses(self.findings) if self.findings else ''}.{outside}"

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


def best_variant(metrics: Sequence[Row], comparisons: Sequence[Row], validation: Sequence[Row]) -> BestVariant | None:
    """Return the variant to deploy: the highest primary metric on validation users.

    Equal values go to the simpler variant.

    Args:
        metrics: rows of metrics.json.
        comparisons: rows of comparisons.json.
        validation: rows of validation.json.
    """
    primary = primary_metric(row["metric"] for row in metrics if row["protocol"] == FULL)
    chosen, values = _values(validation, primary), _values(metrics, primary)
    name = min(set(chosen) & set(values), key=lambda row: (-chosen[row], variant_order(row)), default=None)
    if name is None:
        return None
    cheap = cheap_suffix(name)
    others = [baseline + cheap for baseline in baselines(values) if baseline + cheap != name]
    findings = {baseline: find(comparisons, name, baseline, primary) for baseline in others}
    outside = max(filter(is_external, values), key=values.__getitem__, default=name)
    better = (variant_title(outside), values[outside]) if values[outside] > values[name] else None
    return BestVariant(name, primary, chosen[name], values[name], findings, better)


def _values(rows: Sequence[Row], metric: str) -> dict[str, float]:
    return {row["variant"]: row["value"] for row in rows if (row["protocol"], row["metric"]) == (FULL, metric)}


def verdict(
    metrics: Sequence[Row], comparisons: Sequence[Row], validation: Sequence[Row], variant: str, seed: int
) -> Verdict:
    """Judge what the main variant adds to all that is cheap, and name the variant to deploy.

    The judged row is the variant's fusion with all that is cheap; the variant alone where that was not evaluated.

    Args:
        metrics: rows of metrics.json.
        comparisons: rows of comparisons.json.
        validation: rows of validation.json.
        variant: row name of the main variant.
        seed: seed of the run, named since one run cannot show how results vary between seeds.
    """
    full = [row for row in metrics if row["protocol"] == FULL]
    primary = primary_metric(row["metric"] for row in full)
    own = {row["variant"]: row for row in full if row["metric"] == primary}
    title, best = variant_title(variant), best_variant(metrics, comparisons, validation)
    if variant not in own or best is None:
        return Verdict("inconclusive", f"{title} was not evaluated.", (), best)
    whole = variant + FUSED + CHEAP
    judged = whole if whole in own else variant
    names = [name + cheap_suffix(judged) for name in baselines(own)]
    findings = {name: find(comparisons, judged, name, primary) for name in names if name != judged}
    sentences = [
        *(_reached(own[name], primary) for name in dict.fromkeys((judged, variant))),
        *(_sentence(finding, baseline) for baseline, finding in findings.items()),
        *_other_metrics(comparisons, judged, primary, findings),
        *_beyond_late_fusion(comparisons, variant, baselines(own)[-1], primary),
        *([best.sentence] if best.name != judged or best.better_outside else []),
        f"The intervals cover the draw of test users only: each variant was trained once, with seed {seed}. "
        "The comparisons are not corrected for their number.",
    ]
    outcome = _overall(findings)
    return Verdict(outcome, _headline(variant, judged, primary, findings, best), tuple(sentences), best)


def _reached(row: Row, metric: str) -> str:
    return (
        f"{variant_title(row['variant'])} reaches {metric_title(metric)} {figure(row['value'])} (95% interval "
        f"{interval(row['low'], row['high'])}) over n={row['n']:,} test users, ranking the full catalogue."
    )


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


def _headline(variant: str, judged: str, metric: str, findings: Findings, best: BestVariant) -> str:
    title = variant_title(judged)
    about_best = "It is" if best.name == judged else f"{best.title} is"
    compared = f"on {metric_title(metric)}, {title} {_clauses(findings)}"
    if judged != variant:
        adds = {
            "better": f"{variant_title(variant)} adds to all that is cheap",
            "worse": f"{variant_title(variant)} harms what is cheap",
            "inconclusive": f"No evidence that {variant_title(variant)} adds to all that is cheap",
        }
        compared = f"{adds[_overall(findings)]}: {compared}"
    return f"{compared[0].upper()}{compared[1:]}. {about_best} the best variant on validation users."


def _overall(findings: Findings) -> Outcome:
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


def _beyond_late_fusion(comparisons: Sequence[Row], variant: str, text: str, metric: str) -> list[str]:
    """Compare both sides with the ID score alone added: what do the slots add to that of the text?"""
    finding = find(comparisons, variant + FUSED, text, metric)
    if finding is None:
        return []
    meaning = {
        "better": "the slots add information that the ID score does not have",
        "inconclusive": "no evidence that the slots add information beyond the ID score",
        "worse": "next to the ID score, the slots do harm",
    }
    return [f"{variant_title(finding.variant)} {finding.clause()} ({finding.evidence()}): {meaning[finding.outcome]}."]
