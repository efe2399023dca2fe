"""The plot of `make_results.py`: a metric over the field of a grid, one line an arm, with intervals."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results_tables import Arms

from rarec.artefacts import write_text
from rarec.errors import UserError
from rarec.evaluation.labels import FUSED, ID_ONLY, LATE_FUSION, arm_title, metric_title, tick

METRIC = "ndcg@10"
COLOURS = {ID_ONLY: "#7a7a7a", "text_only": "#c08a2b", "main": "#2b6cb0"}
WIDE = 10
"""A field whose largest value is so many times its smallest has a logarithmic axis."""


def draw(file: Path, field: str, points: Sequence[tuple[Any, Arms]]) -> None:
    """Write the SVG; equal figures give equal bytes.

    Args:
        file: of the plot.
        field: of the grid.
        points: its values, each with the run that has it.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a curve needs matplotlib, which is not installed", "pip install 'rarec[report]'") from None
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in points)
    points = sorted(points, key=lambda point: point[0]) if numbers else points
    places = [value for value, _ in points] if numbers else list(range(len(points)))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change the page
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": field, "font.size": 9})
        canvas = Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
        panel = canvas.subplots()
        for arm in _shown([arms for _, arms in points]):
            _line(panel, arm, places, [arms for _, arms in points])
        if numbers and min(places) > 0 and max(places) >= WIDE * min(places):
            panel.set_xscale("log")
        panel.set_xticks(places, [f"{value:g}" if numbers else str(value) for value, _ in points])
        panel.minorticks_off()
        panel.set(xlabel=field, ylabel=metric_title(METRIC))
        panel.yaxis.set_major_formatter(lambda value, _: tick(value))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e2e2e2")
        panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    write_text(file, buffer.getvalue())


def _shown(runs: Sequence[Arms]) -> list[str]:
    """The arms that matter most, where every point has them."""
    main = runs[0].main
    wanted = dict.fromkeys([ID_ONLY, "text_only", main, LATE_FUSION, main + FUSED])
    return [arm for arm in wanted if all(arm in run.means.values for run in runs)]


def _line(panel: Any, arm: str, places: Sequence[float], runs: Sequence[Arms]) -> None:
    """Values with their intervals; a fused arm is dashed, in the colour of the arm behind it."""
    found = [run.means.figures(arm)[METRIC] for run in runs]
    base = arm.removesuffix(FUSED)
    colour = COLOURS.get(base, COLOURS["main"])
    means = [one.mean for one in found]
    ends = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
    dashes = "--" if arm.endswith(FUSED) else "-"
    panel.errorbar(
        places, means, ends, color=colour, linestyle=dashes, marker="o", markersize=4, capsize=3, label=arm_title(arm)
    )
