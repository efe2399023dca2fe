"""The pictures of the results pages, as small SVGs: rows with intervals, and a metric over the field of a grid."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import Any, NamedTuple

from rarec.errors import UserError
from rarec.evaluation.labels import metric_title, tick
from rarec.ranking.intervals import Interval
from rarec.report.plots import NARROW

COLOURS = ("#7a7a7a", "#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#c08a2b")
"""The first is the ID model's."""
BESIDE = 0.08
"""Horizontal distance between lines whose places are names."""
WIDE = 10
"""A field whose largest value is this many times its smallest has a logarithmic axis."""


class Line(NamedTuple):
    """One line of a curve: the field's values, each with a figure.

    Attributes:
        label: in the legend.
        colour: index into `COLOURS`.
        dashed: for a fusion.
        points: value of the field -> figure.
    """

    label: str
    colour: int
    dashed: bool
    points: Mapping[Any, Interval]


def rows_svg(rows: Sequence[tuple[str, Interval]], metric: str) -> str:
    """Draw one row for each figure, with its interval; a line marks the first row's mean."""
    canvas, panel = _canvas(height=0.7 + 0.27 * len(rows), salt=metric)
    panel.axvline(rows[0][1].mean, color=COLOURS[0], linewidth=0.8, linestyle=":")
    for at, (_, found) in enumerate(rows):
        ends = [[found.mean - found.low], [found.high - found.mean]]
        colour = COLOURS[1] if at else COLOURS[0]
        panel.errorbar([found.mean], [at], xerr=ends, color=colour, marker="o", markersize=5, capsize=3)
    panel.set_yticks(range(len(rows)), [label for label, _ in rows])
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlabel(f"{metric_title(metric)}, 95% interval")
    panel.xaxis.set_major_formatter(lambda value, _: tick(value))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", color="#e2e2e2")
    return _svg(canvas)


def strata_svg(seeds: Mapping[str, Mapping[str, Interval]], metric: str) -> str:
    """Draw a difference by bucket of users or items, one panel for each stratum, the seeds side by side.

    Args:
        seeds: for each seed, the difference by `STRATUM BUCKET`.
        metric: its metric.
    """
    names = list(dict.fromkeys(place.rpartition(" ")[0] for found in seeds.values() for place in found))
    canvas, panels = _canvas(height=2.4, salt="strata", columns=len(names))
    for panel, name in zip(panels, names, strict=True):
        panel.axhline(0, color=COLOURS[0], linewidth=0.8)
        buckets: dict[str, None] = {}
        for number, (found, colour) in enumerate(zip(seeds.values(), colours(), strict=False)):
            shown = {place.rpartition(" ")[2]: each for place, each in found.items() if place.startswith(f"{name} ")}
            buckets |= dict.fromkeys(shown)
            places = [at + 2 * BESIDE * (number - (len(seeds) - 1) / 2) for at in range(len(shown))]
            for place, each in zip(places, shown.values(), strict=True):
                panel.plot([place, place], [each.low, each.high], color=COLOURS[colour], linewidth=1.2)
                panel.plot(place, each.mean, "o", color=COLOURS[colour], markersize=3.5)
        panel.set_xticks(range(len(buckets)), list(buckets), fontsize="x-small")
        panel.set_xlim(-0.5, len(buckets) - 0.5)
        panel.set_title(fill(name, NARROW), fontsize="medium")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e2e2e2")
        panel.yaxis.set_major_formatter(lambda value, _: tick(value, signed=True))
    panels[0].set_ylabel(f"{metric_title(metric)}, difference")
    return _svg(canvas)


def curve_svg(lines: Sequence[Line], field: str, metric: str) -> str:
    """Draw a metric over the field of a grid. Values that are no numbers have no order, so they are not joined."""
    values = list(dict.fromkeys(value for line in lines for value in line.points))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    values = sorted(values) if numbers else values
    place = {value: value if numbers else at for at, value in enumerate(values)}
    canvas, panel = _canvas(height=3.6, salt=field)
    for number, line in enumerate(lines):
        _plot(panel, line, place, None if numbers else BESIDE * (number - (len(lines) - 1) / 2))
    if numbers and values[0] > 0 and values[-1] >= WIDE * values[0]:
        panel.set_xscale("log")
    panel.set_xticks(list(place.values()), [f"{value:g}" if numbers else str(value) for value in values])
    panel.minorticks_off()
    panel.set(xlabel=field, ylabel=metric_title(metric))
    panel.yaxis.set_major_formatter(lambda value, _: tick(value))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e2e2e2")
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(canvas)


def colours() -> Iterator[int]:
    """Yield the colours of entries, without that of the ID model."""
    return cycle(range(1, len(COLOURS)))


def _plot(panel: Any, line: Line, place: Mapping[Any, float], beside: float | None) -> None:
    points = sorted(line.points.items(), key=lambda point: place[point[0]])
    means = [found.mean for _, found in points]
    ends = [[found.mean - found.low for _, found in points], [found.high - found.mean for _, found in points]]
    joined = beside is None
    style = {"linestyle": ("--" if line.dashed else "-") if joined else "none", "marker": "o", "markersize": 4}
    style |= {} if joined or not line.dashed else {"markerfacecolor": "white"}
    places = [place[value] + (beside or 0.0) for value, _ in points]
    panel.errorbar(places, means, ends, color=COLOURS[line.colour], label=line.label, capsize=3, **style)


def _canvas(height: float, salt: str, columns: int = 0) -> tuple[Any, Any]:
    """Return an empty picture and its panel, or with `columns` a row of that many panels."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib, which is not installed", "pip install 'rarec[report]'") from None
    matplotlib.rcdefaults()  # a user's own matplotlibrc must not change the pages
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9})
    canvas = Figure(figsize=(7, height), layout="constrained", facecolor="white")
    return canvas, canvas.subplots(1, columns, sharey=True, squeeze=False)[0] if columns else canvas.subplots()


def _svg(canvas: Any) -> str:
    """Return the picture as text; equal figures give equal text."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"(\d+\.\d{2})\d+", r"\1", "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n")
