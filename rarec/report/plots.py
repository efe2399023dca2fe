"""The plots of the report, each as inline SVG."""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rarec.evaluation.labels import (
    ID_ONLY,
    MINUS,
    base_variant,
    figure,
    metric_title,
    sentence_case,
    tick,
    variant_title,
)
from rarec.evaluation.verdict import Finding
from rarec.report.run_files import Row, TrainingRecord
from rarec.report.svg import COLOURS, INK, MUTED, RULE, SURFACE, WIDTH, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROW = 24
"""Letters in a line of the title of a narrow panel."""
_POINTS = 160
"""Most points of a loss curve; each is the mean over an equal share of the steps."""
_OUTCOMES = {"better": COLOURS["good"], "worse": COLOURS["bad"], "inconclusive": MUTED}
Lines = Mapping[str, tuple[str, str]]
"""From a line's label to the field that it shows and its colour."""
Points = list[tuple[float, float]]
"""Steps, each with a value."""
NORMS: Lines = {
    "projections p": ("projection_norm", COLOURS["per_layer"]),
    "instructions c": ("instruction_norm", COLOURS["prefix_only"]),
    "text": ("text_norm", COLOURS["text_only"]),
}
CKA: Lines = {
    "ID vectors (before)": ("cka_before", COLOURS["id_only"]),
    "projections": ("cka_after", COLOURS["per_layer"]),
}
ATTENTION: Lines = {"share of slots": ("share", INK), "even attention": ("even", MUTED)}


def forest(metrics: Sequence[Mapping[str, Any]], variants: Sequence[str], names: Sequence[str]) -> str:
    """Plot every variant's value and interval, one panel per metric; a grey band marks the ID model's interval.

    Args:
        metrics: rows of metrics.json.
        variants: row names, from top to bottom.
        names: metrics, from left to right.
    """
    cells = {(row["metric"], row["variant"]): row for row in metrics}
    panels = {name: {v: cells[name, v] for v in variants if (name, v) in cells} for name in names}
    lines = [f"{variant_title(v)} {metric_title(names[0])} {figure(r['value'])}" for v, r in panels[names[0]].items()]
    alt = f"Values with 95% intervals of {len(variants)} variants in {len(names)} metrics. {'; '.join(lines)}."
    places = {variant: place for place, variant in enumerate(reversed(variants))}
    with drawing("forest", alt, height=0.75 + 0.27 * len(variants)) as picture:
        for panel, (name, rows) in zip(picture.panels(len(names)), panels.items(), strict=True):
            if ID_ONLY in rows:
                panel.axvspan(rows[ID_ONLY]["low"], rows[ID_ONLY]["high"], color=RULE, alpha=0.55, linewidth=0)
            for variant, row in reversed(rows.items()):
                _whisker(panel, places[variant], row, _colour(variant), _face(variant))
            panel.set_title(metric_title(name))
            panel.locator_params(axis="x", nbins=4)
            _label_places(panel, [variant_title(variant) for variant in places])
    return picture.svg


def differences(findings: Sequence[Finding]) -> str:
    """Plot paired differences in one metric with their intervals."""
    labels = [f"{variant_title(f.variant)} vs {variant_title(f.baseline)}" for f in findings]
    lines = [f"{label} {f.evidence}, {f.reading}" for label, f in zip(labels, findings, strict=True)]
    alt = f"Paired differences with 95% intervals. {'; '.join(lines)}."
    with drawing("differences", alt, height=0.75 + 0.26 * len(findings)) as picture:
        (panel,) = picture.panels(1)
        panel.axvline(0, color=INK, linewidth=1)
        for place, finding in enumerate(reversed(findings)):
            row = {"value": finding.difference, "low": finding.low, "high": finding.high}
            _whisker(panel, place, row, _OUTCOMES[finding.outcome])
        _label_places(panel, labels[::-1], signed=True)
        panel.set_xlabel(f"difference in {metric_title(findings[0].metric)} (right of zero: the first is better)")
    return picture.svg


def curves(training: Mapping[str, TrainingRecord], metric: str) -> str:
    """Plot losses over steps, and the validation metric with a point at the best step.

    Args:
        training: trainings by variant.
        metric: the validation metric that chose the best step.
    """
    panels: dict[str, dict[str, Points]] = {
        "recommendation loss": {variant: _series(r.losses, "recommendation") for variant, r in training.items()},
        "alignment loss": {variant: _series(r.losses, "align") for variant, r in training.items()},
        f"validation {metric_title(metric)}": {variant: _validation(r, metric) for variant, r in training.items()},
    }
    shown = {title: {variant: points for variant, points in panels[title].items() if points} for title in panels}
    shown = {title: lines for title, lines in shown.items() if lines}
    alt = f"Curves over training steps of {', '.join(map(variant_title, training))}: {', '.join(shown)}."
    with drawing("curves", alt, height=2.9) as picture:
        axes = picture.canvas.subplots(1, len(shown), squeeze=False)[0]
        for panel, (title, lines) in zip(axes, shown.items(), strict=True):
            for variant, points in lines.items():
                colour = _colour(variant)
                panel.plot(*zip(*points, strict=True), color=colour, label=variant_title(variant))
                best = training[variant].done.get("best_step") if title.startswith("validation") else None
                if best in dict(points):
                    panel.plot(best, dict(points)[best], "o", color=colour)
            panel.set_title(title)
            panel.set_xlabel("step")
            panel.yaxis.set_major_formatter(lambda value, _: tick(value))
            panel.locator_params(axis="x", nbins=5, integer=True)
        picture.legend()
    return picture.svg


def strata(rows: Sequence[Row], compared: Sequence[str]) -> str:
    """Plot a metric by bucket of users or items, variants side by side, each with its interval.

    Args:
        rows: rows of strata.json, of one stratum and metric.
        compared: names of the variants to show where they are in the rows, from left to right.
    """
    stratum, metric = rows[0]["stratum"], metric_title(rows[0]["metric"])
    variants = [variant for variant in dict.fromkeys(compared) if variant in {row["variant"] for row in rows}]
    buckets = {row["bucket"]: row for row in sorted(rows, key=lambda row: row["order"])}
    shown = [row for row in rows if row["variant"] in variants]
    lines = [f"{variant_title(row['variant'])} at {row['bucket']}: {figure(row['value'])}" for row in shown]
    alt = f"{metric} by {stratum}, with 95% intervals. {'; '.join(lines)}."
    with drawing(f"strata-{stratum.replace(' ', '-')}", alt, width=WIDTH / 2, height=2.9) as picture:
        (panel,) = picture.panels(1)
        for row in shown:
            shift = (variants.index(row["variant"]) - (len(variants) - 1) / 2) * 0.64 / len(variants)
            place = list(buckets).index(row["bucket"]) + shift
            _whisker(panel, place, row, _colour(row["variant"]), _face(row["variant"]), upright=True)
        _label_places(panel, [f"{name}\nn={row['n']:,}" for name, row in buckets.items()], upright=True)
        panel.set_title(f"{metric} by {stratum}")
        for variant in variants:  # no points, but the legend's keys
            (key,) = panel.plot([], [], "o-", color=_colour(variant), label=variant_title(variant))
            key.set_markerfacecolor(_face(variant))
        picture.legend(columns=min(2, len(variants)))
    return picture.svg


def slots_gain(rows: Sequence[Row]) -> str:
    """Plot what the slots add by bucket of users or items, one panel per stratum.

    Args:
        rows: rows of strata.json of one difference and metric.
    """
    variant, baseline = (variant_title(name) for name in rows[0]["variant"].split(MINUS))
    metric = metric_title(rows[0]["metric"])
    lines = [f"{row['stratum']} {row['bucket']}: {figure(row['value'], signed=True)}" for row in rows]
    alt = f"{metric} of {variant} minus {baseline}, with 95% intervals. {'; '.join(lines)}."
    names = list(dict.fromkeys(row["stratum"] for row in rows))
    with drawing("slots-gain", alt, height=2.6) as picture:
        panels = picture.panels(len(names))
        for panel, name in zip(panels, names, strict=True):
            shown = sorted((row for row in rows if row["stratum"] == name), key=lambda row: row["order"])
            panel.axhline(0, color=INK, linewidth=1)
            for place, row in enumerate(shown):
                outcome = "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "inconclusive"
                _whisker(panel, place, row, _OUTCOMES[outcome], upright=True)
            _label_places(panel, [row["bucket"] for row in shown], upright=True, signed=True)
            panel.set_xlim(-0.5, len(shown) - 0.5)
            panel.set_title(fill(name, NARROW))
        panels[0].set_ylabel(f"{metric}, difference")
    return picture.svg


def alignment(diagnostics: Mapping[str, Any]) -> Iterator[str]:
    """Plot norms, CKA and attention by block, each if diagnostics.json holds it."""
    blocks, attention = diagnostics["blocks"], diagnostics["attention"]
    kinds = (
        ("norms", "norm by block", NORMS, blocks),
        ("cka", "CKA with the text by block", CKA, blocks),
        ("attention", "attention of the text by block", ATTENTION, attention),
    )
    for name, title, lines, rows in kinds:
        if any(row[field] is not None for row in rows for field, _ in lines.values()):
            yield _by_block(name, title, lines, rows)


def _by_block(name: str, title: str, lines: Lines, rows: Sequence[Row]) -> str:
    """Plot lines over blocks, one panel per side (and source, where rows have one); norms on a logarithmic scale."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(" ".join([row["side"], *([row["source"]] if "source" in row else [])]), []).append(row)
    alt = f"{sentence_case(title)}. {'; '.join(_ends(lines, own, place) for place, own in panels.items())}."
    with drawing(f"alignment-{name}", alt, width=WIDTH / 2, height=2.6) as picture:
        axes = picture.panels(len(panels))
        for panel, (place, own) in zip(axes, panels.items(), strict=True):
            for label, (field, colour) in lines.items():
                points = [(row["block"], row[field]) for row in own if row[field] is not None]
                if points:
                    panel.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=3.5)
            panel.set_title(f"{title.partition(' by ')[0]}, {place}")
            panel.set_xlabel("block")
            panel.locator_params(axis="x", nbins=5, integer=True)
        if name == "norms":
            _logarithmic(axes)
        else:
            axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))  # last, since it fixes the top as well
        picture.legend()
    return picture.svg


def _logarithmic(axes: Sequence["Axes"]) -> None:
    """Set a logarithmic scale with plain numbers at its ticks, also over less than a decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    for panel in axes:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _ends(lines: Lines, rows: Sequence[Row], place: str) -> str:
    """Return the values at the first and the last block, for the alt text."""
    ends = {row["block"]: row for row in (rows[0], rows[-1])}
    known = [
        f"{label} {row[field]:.3g} at block {block}"
        for label, (field, _) in lines.items()
        for block, row in ends.items()
        if row[field] is not None
    ]
    return f"{place}: {', '.join(known) or 'none'}"


def _whisker(
    panel: "Axes", place: float, row: Mapping[str, float], colour: str, face: str | None = None, upright: bool = False
) -> None:
    """Draw a value as a point, with a filling of its own if there is a `face`, and its interval as a line."""
    line, point = ([row["low"], row["high"]], [place, place]), ([row["value"]], [place])
    panel.plot(*(line[::-1] if upright else line), color=colour)
    panel.plot(*(point[::-1] if upright else point), "o", color=colour, markerfacecolor=face or colour)


def _label_places(panel: "Axes", labels: Sequence[str], upright: bool = False, signed: bool = False) -> None:
    """Label the places of whiskers, and the ticks of the axis of values, which alone has a grid."""
    values, places = (panel.yaxis, panel.xaxis) if upright else (panel.xaxis, panel.yaxis)
    values.set_major_formatter(lambda value, _: tick(value, signed))
    places.set_ticks(range(len(labels)), labels)
    places.grid(visible=False)
    if not upright:
        panel.set_ylim(-0.6, len(labels) - 0.4)


def _colour(variant: str) -> str:
    return COLOURS.get(base_variant(variant), INK)


def _face(variant: str) -> str:
    """Return the filling of a variant's points, which are hollow if a score is added."""
    return SURFACE if "+" in variant else _colour(variant)


def _series(lines: Sequence[Row], name: str) -> Points:
    """Return steps and values, as means over equal shares of the steps; none where the value is always zero."""
    known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if not any(value for _, value in known):
        return []
    size = -(-len(known) // _POINTS)
    shares = [known[start : start + size] for start in range(0, len(known), size)]
    return [
        (sum(step for step, _ in share) / len(share), sum(value for _, value in share) / len(share)) for share in shares
    ]


def _validation(record: TrainingRecord, metric: str) -> Points:
    known = [(line["step"], line["validation"].get(metric)) for line in record.validations]
    return [(step, value) for step, value in known if value is not None]
