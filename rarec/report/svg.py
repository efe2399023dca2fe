"""Inline SVG figures that take colours (light or dark) from the page. Equal data give equal bytes.

matplotlib draws with sentinel colours, which are then replaced by the page's CSS variables.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VARIABLES = (
    *("ink", "muted", "rule", "surface", "good", "bad", "id_only", "text_only", "prefix_only", "input", "per_layer"),
    *("per_layer_lora", "readout", "text_lora"),
)
COLOURS = {name: f"#{number:06x}" for number, name in enumerate(_VARIABLES, start=1)}
"""The sentinel colour of each of the page's CSS variables; those of variants have the variant's name."""
INK, MUTED, RULE, SURFACE = (COLOURS[name] for name in ("ink", "muted", "rule", "surface"))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "lines.markersize": 5,
    "legend.frameon": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
WIDTH = 9.6
"""Width of a full plot, in inches."""


@dataclass
class Picture:
    """A figure to draw on.

    Attributes:
        canvas: the figure.
        panels: side by side.
        svg: its SVG, once it is drawn.
    """

    canvas: "Figure"
    panels: list["Axes"]
    svg: str = ""

    def legend(self) -> None:
        """Explain every labelled line below the panels, each label once."""
        lines = [line for panel in self.panels for line in panel.get_lines()]
        handles = {line.get_label(): line for line in lines if not str(line.get_label()).startswith("_")}
        self.canvas.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles))


@contextmanager
def drawing(
    name: str, alt: str, panels: int = 1, *, height: float, width: float = WIDTH, share: str = "y"
) -> Iterator[Picture]:
    """Yield a picture, and turn it into SVG afterwards. matplotlib's global state stays as it is.

    Args:
        name: prefix of the ids in the SVG, unique on the page.
        alt: the plot in words, for readers who cannot see it.
        panels: their number.
        height: in inches.
        width: in inches.
        share: the axes that all panels have in common: `x`, `y`, `xy` or none.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change the report
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        canvas = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        axes = canvas.subplots(1, panels, sharex="x" in share, sharey="y" in share, squeeze=False)[0]
        picture = Picture(canvas, list(axes))
        yield picture
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
        picture.svg = _inline(buffer.getvalue(), name, alt)


def _inline(svg: str, name: str, alt: str) -> str:
    """Turn a standalone SVG into a part of the page: unique ids, the page's colours, alt text."""
    variables = {colour: f"var(--{variable.replace('_', '-')})" for variable, colour in COLOURS.items()}
    box = re.search(r'viewBox="[^"]+"', svg)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(alt)}">'
    svg = re.sub(r".*?<svg[^>]*>", lambda _: opening, svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    return re.sub(r"#0000[0-9a-f]{2}\b", lambda colour: variables[colour[0]], svg).strip()
