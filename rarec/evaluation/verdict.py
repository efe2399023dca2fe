"""The verdict of a run in words, the variant to deploy, and the sanity checks.

The question that the verdict answers first: does the main variant add to the untrained baselines? Both sides have the
ID model's score and that of every model that needs no training. A claim needs the whole 95% interval of a paired
difference on one side of zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rarec.evaluation.results import (
    CHEAP,
    FUSED,
    HEADLINE,
    ID_ONLY,
    SANITY_CHECKS,
    WITHOUT,
    Finding,
    Findings,
    Outcome,
    Results,
    Row,
    baselines,
    cheap_suffix,
    figure,
    interval,
    is_external,
    listed,
    part_title,
    sentence_case,
    title_in_sentence,
    variant_order,
    variant_title,
)
from rarec.neighbours.scores import NEW

_PREDICATES: dict[Outcome | None, str] = {
    None: "was not compared with",
    "better": "is better than",
    "worse": "is worse than",
    "inconclusive": "is not significantly different from",
}
"""What is said of a variant before a baseline's title, by the outcome of their comparison."""
_ADDS: dict[Outcome, str] = {
    "better": "{} adds to the untrained baselines",
    "worse": "{} makes the untrained baselines worse",
    "inconclusive": "No evidence that {} adds to the untrained baselines",
}
_BEYOND: dict[Outcome, str] = {
    "better": "the slots add information that the ID score does not have",
    "worse": "next to the ID score, the slots do harm",
    "inconclusive": "no evidence that the slots add information beyond the ID score",
}
_CHECKED: dict[Outcome, str] = {
    "better": "The variant gets better, so it does not use what was destroyed as it should",
    "worse": "The variant gets worse, as it must",
    "inconclusive": "No significant loss: no evidence that the variant uses what was destroyed",
}


def parts_worth(
    results: Results, fusions: Mapping[str, Mapping[str, Row]], variant: str, metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what each part of a variant's fusion with the untrained baselines is worth beside all the others.

    Args:
        results: the figures of the evaluation.
        fusions: contents of fusion.json.
        variant: row name of the variant.
        metrics: such as `ndcg@10`.

    Returns:
        For each part `title`; `weight`, of its standardised score (all sum to 1); `findings`, by metric: the whole
        fusion against the one without the part, with weights of its own. Nothing if there is no such fusion.
    """
    whole = variant + FUSED + CHEAP
    worth = []
    for part, fitted in fusions.get(whole, {}).items():
        if part == NEW:
            continue
        rest = ID_ONLY + CHEAP if part == variant else f"{whole}{WITHOUT}{part}"
        findings = {metric: finding for metric in metrics if (finding := results.find(whole, rest, metric))}
        worth.append({"title": part_title(part), "weight": fitted["share"], "findings": findings})
    return worth


def sanity_checks(results: Results, variant: str) -> list[dict[str, Any]]:
    """Judge every sanity check that was run: a trained variant, ranked again with one source of information destroyed.

    Returns:
        For each `title`, what was destroyed; `passed`, True if the variant became significantly worse, as it must, None
        if it was not compared in pairs; `text`, the result in words.
    """
    return [_sanity_check(results, variant, name) for name in SANITY_CHECKS if f"{variant}/{name}" in results.values]


def _sanity_check(results: Results, variant: str, name: str) -> dict[str, Any]:
    row = f"{variant}/{name}"
    values = results.values
    finding = results.find(row, variant)
    if finding:
        change = f", from {figure(values[variant])} to {figure(values[row])}" if variant in values else ""
        text = f"{_CHECKED[finding.outcome]} ({finding.evidence}{change})."
    else:
        reached = f"{results.primary.upper()} is {figure(values[row])}"
        text = f"{reached}, but was not compared in pairs, so nothing is claimed."
    if name == "permuted_ids":
        text += _against_text(results, row)
    return {"title": SANITY_CHECKS[name], "passed": finding.outcome == "worse" if finding else None, "text": text}


def _against_text(results: Results, row: str) -> str:
    """Compare the variant with permuted IDs to text only, with LoRA if the run has that."""
    text = baselines(results.values)[-1].removesuffix(FUSED)
    if text not in results.values:
        return ""
    finding = results.find(row, text)
    compared = f"; with permuted IDs, the variant {_compared(finding, 'it')}" if finding else ""
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
    def sentence(self) -> str:
        """The best variant, its value, and the outcome of its comparisons, in words."""
        values = f"{self.metric.upper()} {figure(self.chosen)}; on test users {figure(self.value)}"
        compared = f": it {_clauses(self.findings)}" if self.findings else ""
        sentence = f"{self.title} is best on validation users ({values}){compared}."
        if self.better_outside:
            title, value = self.better_outside
            sentence += f" On test users, {title} is higher, at {figure(value)}."
        return sentence

    @property
    def advice(self) -> str:
        """The variant to deploy, in words, with the simplest baseline that is not significantly worse."""
        as_good = [name for name, finding in self.findings.items() if finding and finding.outcome == "inconclusive"]
        simpler = [title_in_sentence(name) for name in as_good if variant_order(name) < variant_order(self.name)]
        other = f", or {simpler[0]}, which is simpler and not significantly worse" if simpler else ""
        return f"Deploy: {self.title}{other}."


def best_variant(results: Results) -> BestVariant | None:
    """Return the variant to deploy: the highest primary metric on validation users.

    Equal values go to the simpler variant.
    """
    values = results.values
    validated = Results(results.validation).cells
    chosen = {
        name: validated[name, results.primary]["value"] for name in values if (name, results.primary) in validated
    }
    if not chosen:
        return None
    name = min(chosen, key=lambda row: (-chosen[row], variant_order(row)))
    findings = results.find_all(name, (baseline + cheap_suffix(name) for baseline in baselines(values)))
    outside = max(filter(is_external, values), key=values.__getitem__, default=name)
    better = (variant_title(outside), values[outside]) if values[outside] > values[name] else None
    return BestVariant(name, results.primary, chosen[name], values[name], findings, better)


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
    rivals = baselines(results.values)
    whole = variant + FUSED + CHEAP
    judged = whole if whole in results.values else variant
    findings = results.find_all(judged, (rival + cheap_suffix(judged) for rival in rivals))
    sentences = [
        *(_reached(results, name) for name in dict.fromkeys((judged, variant))),
        *(f"It {_compared(finding, title_in_sentence(baseline))}." for baseline, finding in findings.items()),
        *_other_metrics(results, judged, findings),
        *_beyond_late_fusion(results, variant, rivals[-1]),
        *([best.sentence] if best.name != judged or best.better_outside else []),
        f"The intervals cover the draw of test users only: each variant was trained once, with seed {seed}. "
        "The comparisons are not corrected for their number.",
    ]
    return Verdict(_overall(findings), _headline(variant, judged, findings, best), tuple(sentences), best)


def _headline(variant: str, judged: str, findings: Findings, best: BestVariant) -> str:
    compared = f"on {best.metric.upper()}, {variant_title(judged)} {_clauses(findings)}"
    if judged != variant:
        compared = f"{_ADDS[_overall(findings)].format(variant_title(variant))}: {compared}"
    about_best = "It is" if best.name == judged else f"{best.title} is"
    return f"{sentence_case(compared)}. {about_best} the best variant on validation users."


def _reached(results: Results, variant: str) -> str:
    row = results.cells[variant, results.primary]
    return (
        f"{variant_title(variant)} reaches {results.primary.upper()} {figure(row['value'])} (95% interval "
        f"{interval(row['low'], row['high'])}) over n={row['n']:,} test users, ranking the full catalogue."
    )


def _other_metrics(results: Results, variant: str, findings: Findings) -> list[str]:
    """Say in one sentence which of the other headline metrics agree with the primary one, and which do not."""
    compared = {baseline: finding.outcome for baseline, finding in findings.items() if finding}
    same, otherwise = [], []
    for metric in HEADLINE:
        known = {name: finding for name, finding in results.find_all(variant, compared, metric).items() if finding}
        differing = {name: finding for name, finding in known.items() if finding.outcome != compared[name]}
        if differing:
            otherwise.append(f"on {metric.upper()} it {_clauses(differing)}")
        elif known and metric != results.primary:
            same.append(metric.upper())
    agreeing = [f"{listed(same)} agree{'s' if len(same) == 1 else ''}"] if same else []
    sentence = ", but ".join(agreeing + (["; ".join(otherwise)] if otherwise else []))
    return [f"{sentence_case(sentence)}."] if sentence else []


def _beyond_late_fusion(results: Results, variant: str, text: str) -> list[str]:
    """Compare both sides with the ID score alone added: what do the slots add to that of the text?"""
    finding = results.find(variant + FUSED, text)
    if finding is None:
        return []
    compared = f"{variant_title(variant + FUSED)} {_compared(finding, variant_title(text))}"
    return [f"{compared}: {_BEYOND[finding.outcome]}."]


def _overall(findings: Findings) -> Outcome:
    outcomes = {finding.outcome if finding else "inconclusive" for finding in findings.values()}
    if "worse" in outcomes:
        return "worse"
    return "better" if outcomes == {"better"} else "inconclusive"


def _predicate(finding: Finding | None) -> str:
    return _PREDICATES[finding.outcome if finding else None]


def _compared(finding: Finding | None, baseline: str) -> str:
    """Return the outcome and its numbers as a clause without subject: `is better than the ID model (...)`."""
    evidence = f" ({finding.evidence})" if finding else ""
    return f"{_predicate(finding)} {baseline}{evidence}"


def _clauses(findings: Findings) -> str:
    """Join outcomes, grouping baselines by outcome: `is better than A and B, and is worse than C`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for baseline, finding in findings.items():
        users = f" (n={finding.n:,})" if finding and finding.outcome == "inconclusive" else ""
        groups.setdefault((_predicate(finding), users), []).append(title_in_sentence(baseline))
    return ", and ".join(f"{predicate} {listed(titles)}{users}" for (predicate, users), titles in groups.items())
