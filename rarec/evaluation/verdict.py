"""What the paired intervals allow one to say, in plain words, and nothing more (ours)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rarec.evaluation.labels import (
    FULL,
    FUSED,
    HEADLINE,
    ID_ONLY,
    LATE_FUSION,
    PROBES,
    arm_title,
    figure,
    interval,
    listed,
    metric_title,
    primary_metric,
)

Row = Mapping[str, Any]
Outcome = Literal["beats", "loses", "open"]
RIVALS = {ID_ONLY: "its own ID model", LATE_FUSION: "the late fusion of text and ID scores"}


@dataclass(frozen=True)
class Finding:
    """A paired comparison of two arms over the same test users, and how it reads.

    Attributes:
        arm: the one that is judged.
        baseline: its rival.
        metric: such as `ndcg@10`.
        difference: mean over users of arm minus baseline.
        low: of the 95% interval of the difference.
        high: of the same.
        n: test users.
    """

    arm: str
    baseline: str
    metric: str
    difference: float
    low: float
    high: float
    n: int

    @property
    def outcome(self) -> Outcome:
        """`beats` only with the whole interval above zero, `loses` only with it below; else `open`."""
        return "beats" if self.low > 0 else "loses" if self.high < 0 else "open"

    @property
    def reading(self) -> str:
        """The outcome in words."""
        words = {"beats": "beats", "loses": "loses to", "open": f"no difference can be claimed at n={self.n:,}"}
        return words[self.outcome]

    def clause(self, rival: str) -> str:
        """`beats RIVAL`, `loses to RIVAL`, or that no difference can be claimed."""
        if self.outcome == "open":
            return f"against {rival}, {self.reading}"
        return f"it {self.reading} {rival}"

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
        outcome: `beats` if the arm beats all of its rivals, `loses` if it loses to one, else `open`.
        headline: one sentence.
        sentences: the paragraph.
    """

    outcome: Outcome
    headline: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """A test of honesty: the same trained arm, ranked again with one source of information destroyed.

    Attributes:
        title: what was destroyed.
        passed: whether the arm became worse, as it must; None where that was not compared in pairs.
        text: the reading.
    """

    title: str
    passed: bool | None
    text: str


def find(comparisons: Iterable[Row], arm: str, baseline: str, metric: str) -> Finding | None:
    """The full-ranking comparison of two arms, whichever way round it was written; None if there is none."""
    for row in comparisons:
        if row["metric"] != metric or row["protocol"] != FULL:
            continue
        if (row["arm"], row["baseline"]) == (arm, baseline):
            return Finding(arm, baseline, metric, row["difference"], row["low"], row["high"], row["n"])
        if (row["arm"], row["baseline"]) == (baseline, arm):
            return Finding(arm, baseline, metric, -row["difference"], -row["high"], -row["low"], row["n"])
    return None


def verdict(metrics: Sequence[Row], comparisons: Sequence[Row], arm: str, seed: int) -> Verdict:
    """Whether an arm beats its own ID model and the late fusion of text and ID scores.

    Args:
        metrics: rows of metrics.json.
        comparisons: rows of comparisons.json.
        arm: the arm that is exported.
        seed: of the run, named as the limit of what one run can show.
    """
    full = [row for row in metrics if row["protocol"] == FULL]
    primary = primary_metric(row["metric"] for row in full)
    own = next((row for row in full if row["arm"] == arm and row["metric"] == primary), None)
    title = arm_title(arm)
    if own is None:
        return Verdict("open", f"{title} was not evaluated: nothing can be claimed.", ())
    findings = {rival: find(comparisons, arm, rival, primary) for rival in RIVALS}
    sentences = [
        f"{title} reaches {metric_title(primary)} {figure(own['value'])} (95% interval "
        f"{interval(own['low'], own['high'])}) over n={own['n']:,} test users, ranking the full catalogue.",
        *(_about(finding, RIVALS[rival]) for rival, finding in findings.items()),
        *_other_metrics(comparisons, arm, primary, findings),
        *_complement(comparisons, arm, primary),
        f"The intervals cover the draw of test users only: each arm was trained once, with seed {seed}, and the "
        "comparisons are not corrected for their number.",
    ]
    return Verdict(_overall(findings.values()), _headline(title, findings), tuple(sentences))


def probes(metrics: Sequence[Row], comparisons: Sequence[Row], arm: str) -> list[Probe]:
    """How an arm fared under each probe that was run."""
    full = [row for row in metrics if row["protocol"] == FULL]
    primary = primary_metric(row["metric"] for row in full)
    values = {row["arm"]: row["value"] for row in full if row["metric"] == primary}
    return [_probe(values, comparisons, arm, name, primary) for name in PROBES if f"{arm}/{name}" in values]


def _probe(values: Mapping[str, float], comparisons: Sequence[Row], arm: str, name: str, metric: str) -> Probe:
    row = f"{arm}/{name}"
    reached = [f"{metric_title(metric)} is {figure(values[row])}"]
    reached += [f"{figure(values[arm])} without the probe"] if arm in values else []
    if name == "permuted_ids" and "text_only" in values:
        reached.append(f"text only stands at {figure(values['text_only'])}")
    figures = ", ".join(reached) + "."
    finding = find(comparisons, row, arm, metric)
    if finding is None:
        return Probe(PROBES[name], None, f"{figures} It was not compared in pairs, so nothing is claimed.")
    said = {
        "loses": "The arm gets worse, as it must",
        "open": f"No loss can be claimed at n={finding.n:,}: the arm is not shown to use what was destroyed",
        "beats": "The arm gets better, as an honest one must not",
    }
    return Probe(PROBES[name], finding.outcome == "loses", f"{said[finding.outcome]} ({finding.evidence()}). {figures}")


def _about(finding: Finding | None, rival: str) -> str:
    if finding is None:
        return f"It was not compared with {rival}."
    clause = finding.clause(rival)
    return f"{clause[0].upper()}{clause[1:]} ({finding.evidence()})."


def _headline(title: str, findings: Mapping[str, Finding | None]) -> str:
    by_outcome: dict[str, list[str]] = {}
    for rival, finding in findings.items():
        by_outcome.setdefault(finding.reading if finding else "was not compared with", []).append(RIVALS[rival])
    clauses = [
        f"against {listed(rivals)}, {reading}" if reading.startswith("no difference") else f"{reading} {listed(rivals)}"
        for reading, rivals in by_outcome.items()
    ]
    joined = "; ".join(clauses)
    return f"{title}: {joined}." if joined.startswith("against") else f"{title} {joined}."


def _overall(findings: Iterable[Finding | None]) -> Outcome:
    outcomes = {finding.outcome if finding else "open" for finding in findings}
    if "loses" in outcomes:
        return "loses"
    return "beats" if outcomes == {"beats"} else "open"


def _other_metrics(
    comparisons: Sequence[Row], arm: str, primary: str, findings: Mapping[str, Finding | None]
) -> list[str]:
    """One sentence: the other headline metrics read the same, or which of them read otherwise."""
    same, otherwise = [], []
    for metric in HEADLINE:
        there = {rival: find(comparisons, arm, rival, metric) for rival in RIVALS}
        pairs = [(there[rival], first, RIVALS[rival]) for rival, first in findings.items()]
        known = [(found, first, name) for found, first, name in pairs if found and first]
        if metric == primary or not known:
            continue
        differing = [found.clause(name) for found, first, name in known if found.outcome != first.outcome]
        if differing:
            otherwise.append(f"on {metric_title(metric)}, {listed(differing)}")
        else:
            same.append(metric_title(metric))
    parts = [f"{listed(same)} read{'s' if len(same) == 1 else ''} the same way."] if same else []
    return parts + ([f"Not every metric reads the same way: {'; '.join(otherwise)}."] if otherwise else [])


def _complement(comparisons: Sequence[Row], arm: str, metric: str) -> list[str]:
    """With the ID score added to both: do the slots carry anything that late fusion lacks?"""
    finding = find(comparisons, arm + FUSED, LATE_FUSION, metric)
    if finding is None or arm + FUSED == LATE_FUSION:
        return []
    carried = {
        "beats": "the slots carry something that adding the scores does not bring",
        "open": "the slots are not shown to carry anything that adding the scores does not bring",
        "loses": "beside the ID score, the slots cost more than they bring",
    }
    clause = finding.clause("the late fusion without slots")
    return [f"With the ID score added to it as well, {clause} ({finding.evidence()}): {carried[finding.outcome]}."]
