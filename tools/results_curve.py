"""The plots of `make_results.py`: a metric over the field of a grid, with intervals; one line a variant, or an entry."""

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from results_tables import Variants

from rarec.errors import UserError
from rarec.evaluation.labels import FUSED, ID_ONLY, LATE_FUSION, metric_title, tick, variant_title
from rarec.files import write_text

METRIC = "hr@100"
COLOURS = {ID_ONLY: "#7a7a7a", "text_only": "#c08a2b", "main": "#2b6cb0"}
OF_ENTRIES = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#718096")
BESIDE = 0.08
"""From one variant to the next, where the field's values are names."""
WIDE = 10
"""A field whose largest value is so many times its smallest has a logarithmic axis."""

Points = Sequence[tuple[Any, Variants]]


class Line(NamedTuple):
    """One variant over the points of one entry; a fused variant is dashed, or hollow, in the colour of the variant behind it."""

    label: str
    variant: str
    colour: str
    points: Points


def draw(file: Path, field: str, entries: Mapping[str, Points]) -> None:
    """Write the SVG; equal figures give equal bytes.

    Args:
        file: of the plot.
        field: of the grids.
        entries: for each entry of the sweep the field's values, each with the run that has it.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a curve needs matplotlib, which is not installed", "pip install 'rarec[report]'") from None
    values = list(dict.fromkeys(value for points in entries.values() for value, _ in points))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    values = sorted(values) if numbers else values
    place = {value: value if numbers else at for at, value in enumerate(values)}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change the page
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": field, "font.size": 9})
        canvas = Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
        panel = canvas.subplots()
        lines = list(_of_one(*entries.values()) if len(entries) == 1 else _of_several(entries))
        for number, line in enumerate(lines):
            _plot(panel, line, place, None if numbers else BESIDE * (number - (len(lines) - 1) / 2))
        if numbers and values[0] > 0 and values[-1] >= WIDE * values[0]:
            panel.set_xscale("log")
        panel.set_xticks(list(place.values()), [f"{value:g}" if numbers else str(value) for value in values])
        panel.minorticks_off()
        panel.set(xlabel=field, ylabel=metric_title(METRIC))
        panel.yaxis.set_major_formatter(lambda value, _: tick(value))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e2e2e2")
        panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    write_text(file, buffer.getvalue())


def _of_one(points: Points) -> Iterator[Line]:
    """The variants that matter most, where every point has them."""
    main = points[0][1].main
    for variant in dict.fromkeys([ID_ONLY, "text_only", main, LATE_FUSION, main + FUSED]):
        if all(variant in run.means.values for _, run in points):
            colour = COLOURS.get(variant.removesuffix(FUSED), COLOURS["main"])
            yield Line(variant_title(variant), variant, colour, points)


def _of_several(entries: Mapping[str, Points]) -> Iterator[Line]:
    """Each entry's main variant and its fusion, and the ID model of the first."""
    yield Line(variant_title(ID_ONLY), ID_ONLY, COLOURS[ID_ONLY], next(iter(entries.values())))
    for (entry, points), colour in zip(entries.items(), cycle(OF_ENTRIES)):
        main = points[0][1].main
        for variant in (main, main + FUSED):
            if all(variant in run.means.values for _, run in points):
                yield Line(f"{entry}{' + ID' if variant.endswith(FUSED) else ''}", variant, colour, points)


def _plot(panel: Any, line: Line, place: Mapping[Any, float], beside: float | None) -> None:
    """Values with their intervals; those of names, which have no order, are not joined, and stand so far beside."""
    points = sorted(line.points, key=lambda point: place[point[0]])
    found = [run.means.figures(line.variant)[METRIC] for _, run in points]
    ends = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
    fused, joined = line.variant.endswith(FUSED), beside is None
    style = {"linestyle": ("--" if fused else "-") if joined else "none", "marker": "o", "markersize": 4, "capsize": 3}
    style |= {} if joined or not fused else {"markerfacecolor": "white"}
    places, means = [place[value] + (beside or 0.0) for value, _ in points], [one.mean for one in found]
    panel.errorbar(places, means, ends, color=line.colour, label=line.label, **style)
