"""The plots of the report, each as inline SVG: values with their intervals, and lines over steps or blocks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rarec.evaluation.results import ID_ONLY, MINUS, Finding, base_variant, figure, sentence_case, tick, variant_title
from rarec.report.run_files import TrainingRecord
from rarec.report.svg import COLOURS, INK, MUTED, RULE, SURFACE, WIDTH, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 160
"""Most points of a loss curve; each is the mean over an equal share of the steps."""
_OUTCOMES = {"better": COLOURS["good"], "worse": COLOURS["bad"], "inconclusive": MUTED}
Row = Mapping[str, Any]
Points = npt.NDArray[np.float64]
"""Places on the horizontal axis, each with a value (P, 2)."""
Fields = Mapping[str, tuple[str, str]]
"""From a line's label to the field that it shows and its colour."""
NORMS: Fields = {
    "projections p": ("projection_norm", COLOURS["per_layer"]),
    "instructions c": ("instruction_norm", COLOURS["prefix_only"]),
    "text": ("text_norm", COLOURS["text_only"]),
}
CKA: Fields = {
    "ID vectors (before)": ("cka_before", COLOURS["id_only"]),
    "projections": ("cka_after", COLOURS["per_layer"]),
}
ATTENTION: Fields = {"share of slots": ("share", INK), "even attention": ("even", MUTED)}


class Mark(NamedTuple):
    """A value with its interval, in a line of its own.

    Attributes:
        label: beside it.
        row: holds `value`, drawn as a point, and `low` and `high`, the ends of its line.
        colour: of both.
        hollow: True for a point that is not filled.
    """

    label: str
    row: Row
    colour: str
    hollow: bool = False


def forest(cells: Mapping[tuple[str, str], Row], variants: Sequence[str], metrics: Sequence[str]) -> str:
    """Plot every variant's values and intervals, one panel per metric.

    Args:
        cells: rows of metrics.json, by variant and metric.
        variants: row names, from top to bottom.
        metrics: from left to right.
    """
    panels = {metric.upper(): {name: cells[name, metric] for name in variants} for metric in metrics}
    alt = f"Values with 95% intervals of {len(variants)} variants in {len(metrics)} metrics"
    return _beside("forest", alt, panels)


def strata(rows: Sequence[Row], compared: Iterable[str]) -> str:
    """Plot values and intervals of some variants in one metric, one panel per bucket of users or items.

    Args:
        rows: rows of strata.json, of one stratum and metric.
        compared: names of the variants to show where they are in the rows, from top to bottom.
    """
    cells = {(row["variant"], row["bucket"]): row for row in rows}
    variants = [variant for variant in dict.fromkeys(compared) if (variant, rows[0]["bucket"]) in cells]
    buckets = {row["bucket"]: row["n"] for row in sorted(rows, key=itemgetter("order"))}
    panels = {f"{b}, n={n:,}": {name: cells[name, b] for name in variants} for b, n in buckets.items()}
    stratum = rows[0]["stratum"]
    title = f"{rows[0]['metric'].upper()} by {stratum}"
    return _beside(f"strata-{stratum.replace(' ', '-')}", f"{title}, with 95% intervals", panels, title)


def _beside(name: str, alt: str, panels: Mapping[str, Mapping[str, Row]], axis: str = "") -> str:
    """Plot a line for each variant across all panels; a grey band marks the ID model's interval.

    Panels whose axis has one title have one scale.
    """
    cells = [(heading, variant, row) for heading, rows in panels.items() for variant, row in rows.items()]
    values = [f"{variant_title(variant)} {heading} {figure(row['value'])}" for heading, variant, row in cells]
    height = 0.75 + 0.27 * len(cells) / len(panels)
    share = "xy" if axis else "y"
    with drawing(name, f"{alt}. {'; '.join(values)}.", len(panels), height=height, share=share) as picture:
        picture.canvas.supxlabel(axis, fontsize="medium", color=MUTED)
        for panel, (heading, rows) in zip(picture.panels, panels.items(), strict=True):
            if band := rows.get(ID_ONLY):
                panel.axvspan(band["low"], band["high"], color=RULE, alpha=0.55, linewidth=0)
            _draw(panel, [Mark(variant_title(name), row, _colour(name), "+" in name) for name, row in rows.items()])
            panel.set_title(heading)
            panel.locator_params(axis="x", nbins=4)
    return picture.svg


def differences(findings: Sequence[Finding]) -> str:
    """Plot paired differences in one metric with their intervals."""
    labelled = {f"{variant_title(f.variant)} vs {variant_title(f.baseline)}": f for f in findings}
    return _around_zero("differences", "Paired differences", labelled, "the first is better")


def slots_gain(rows: Sequence[Row]) -> str:
    """Plot what the slots add by bucket of users or items.

    Args:
        rows: rows of strata.json of one difference and metric.
    """
    pair = rows[0]["variant"].split(MINUS)
    labelled = {}
    for row in rows:
        figures = (row[name] for name in ("metric", "value", "low", "high", "n", "n"))
        labelled[f"{row['stratum']} {row['bucket']}"] = Finding(*pair, *figures)
    return _around_zero("slots-gain", " minus ".join(map(variant_title, pair)), labelled, "the slots help")


def _around_zero(name: str, alt: str, findings: Mapping[str, Finding], better: str) -> str:
    """Plot differences with their labels in one panel."""
    lines = [f"{label} {finding.evidence}, {finding.reading}" for label, finding in findings.items()]
    marks = [
        Mark(label, {"value": finding.difference, "low": finding.low, "high": finding.high}, _OUTCOMES[finding.outcome])
        for label, finding in findings.items()
    ]
    metrics = {finding.metric.upper() for finding in findings.values()}
    alt = f"{alt}, with 95% intervals. {'; '.join(lines)}."
    with drawing(name, alt, height=0.75 + 0.26 * len(marks)) as picture:
        (panel,) = picture.panels
        panel.axvline(0, color=INK, linewidth=1)
        _draw(panel, marks, signed=True)
        panel.set_xlabel(f"difference in {', '.join(metrics)} (right of zero: {better})")
    return picture.svg


def _draw(panel: "Axes", marks: Sequence[Mark], signed: bool = False) -> None:
    """Draw marks from top to bottom; the axis of values alone has a grid."""
    for place, mark in enumerate(marks):
        panel.plot([mark.row["low"], mark.row["high"]], [place, place], color=mark.colour)
        face = SURFACE if mark.hollow else mark.colour
        panel.plot(mark.row["value"], place, "o", color=mark.colour, markerfacecolor=face)
    panel.set_yticks(range(len(marks)), [mark.label for mark in marks])
    panel.set_ylim(len(marks) - 0.4, -0.6)
    panel.grid(visible=False, axis="y")
    panel.xaxis.set_major_formatter(lambda value, _: tick(value, signed))


def _colour(variant: str) -> str:
    return COLOURS.get(base_variant(variant), INK)


def curves(training: Mapping[str, TrainingRecord], metric: str) -> str:
    """Plot losses over steps, and the validation metric with a point at the best step.

    Args:
        training: trainings by variant.
        metric: the validation metric that chose the best step.
    """
    validation = f"validation {metric.upper()}"
    plotted = {
        "recommendation loss": {name: _series(record.losses, "recommendation") for name, record in training.items()},
        "alignment loss": {name: _series(record.losses, "align") for name, record in training.items()},
        validation: {name: _points(record.validations, metric) for name, record in training.items()},
    }
    shown = {title: lines for title, lines in plotted.items() if any(len(points_P2) for points_P2 in lines.values())}
    alt = f"Curves over training steps of {', '.join(map(variant_title, training))}: {', '.join(shown)}."
    with drawing("curves", alt, len(shown), height=2.9, share="") as picture:
        for panel, (title, lines) in zip(picture.panels, shown.items(), strict=True):
            for variant, points_P2 in lines.items():
                panel.plot(*points_P2.T, color=_colour(variant), label=variant_title(variant))
                if title == validation:
                    best_P = points_P2[:, 0] == training[variant].done.get("best_step")
                    panel.plot(*points_P2[best_P].T, "o", color=_colour(variant))
            panel.set(title=title, xlabel="step")
            panel.yaxis.set_major_formatter(lambda value, _: tick(value))
            panel.locator_params(axis="x", nbins=5, integer=True)
        picture.legend()
    return picture.svg


def _points(lines: Sequence[Row], name: str) -> Points:
    """Return steps and values, where there is one."""
    return np.array([(line["step"], line[name]) for line in lines if line.get(name) is not None]).reshape(-1, 2)


def _series(lines: Sequence[Row], name: str) -> Points:
    """Return steps and values, as means over equal shares of the steps; none if all values are zero."""
    known_S2 = _points(lines, name)
    size = max(-(-len(known_S2) // _POINTS), 1)
    shares = np.split(known_S2, range(size, len(known_S2), size))
    return np.array([share.mean(0) for share in shares]) if known_S2[:, 1].any() else known_S2[:0]


def alignment(diagnostics: Mapping[str, Any]) -> Iterator[str]:
    """Plot norms, CKA and attention by block, each if diagnostics.json holds it."""
    blocks, attention = diagnostics["blocks"], diagnostics["attention"]
    kinds = (
        ("norms", "norm by block", NORMS, blocks),
        ("cka", "CKA with the text by block", CKA, blocks),
        ("attention", "attention of the text by block", ATTENTION, attention),
    )
    for name, title, fields, rows in kinds:
        if any(row[field] is not None for row in rows for field, _ in fields.values()):
            yield _by_block(name, title, fields, rows)


def _by_block(name: str, title: str, fields: Fields, rows: Sequence[Row]) -> str:
    """Plot lines over blocks, one panel per side (and source, where rows have one); norms on a logarithmic scale."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        lines = panels.setdefault(f"{row['side']} {row.get('source', '')}".strip(), {})
        for label, (field, _) in fields.items():
            if row[field] is not None:
                lines.setdefault(label, []).append((row["block"], row[field]))
    alts = [f"{place}: {_ends(lines)}" for place, lines in panels.items()]
    alt = f"{sentence_case(title)}. {'; '.join(alts)}."
    with drawing(f"alignment-{name}", alt, len(panels), width=WIDTH / 2, height=2.6) as picture:
        for panel, (place, lines) in zip(picture.panels, panels.items(), strict=True):
            for label, points in lines.items():
                panel.plot(*zip(*points, strict=True), "o-", color=fields[label][1], label=label, markersize=3.5)
            panel.set(title=f"{title.partition(' by ')[0]}, {place}", xlabel="block")
            panel.locator_params(axis="x", nbins=5, integer=True)
            if name == "norms":
                _make_logarithmic(panel)
        if name != "norms":
            bottom, _ = picture.panels[0].get_ylim()
            picture.panels[0].set_ylim(bottom=min(0.0, bottom))  # last, since it fixes the top as well
        picture.legend()
    return picture.svg


def _ends(lines: Mapping[str, list[tuple[float, float]]]) -> str:
    """Return the values at the first and the last block, for the alt text."""
    return ", ".join(f"{label} {points[0][1]:.3g} to {points[-1][1]:.3g}" for label, points in lines.items()) or "none"


def _make_logarithmic(panel: "Axes") -> None:
    """Set a logarithmic scale with plain numbers at its ticks, also over less than a decade."""
    from matplotlib.ticker import LogLocator

    panel.set_yscale("log", subs=[])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
