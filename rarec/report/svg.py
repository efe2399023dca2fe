"""Inline SVG figures that take colours (light or dark) and typeface from the page. Equal data give equal bytes.

matplotlib draws with sentinel colours, which are then replaced by the page's CSS variables.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
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


class Picture:
    """A figure to draw on.

    Attributes:
        canvas: the figure.
        svg: its SVG, once it is drawn.
    """

    def __init__(self, canvas: "Figure") -> None:
        self.canvas, self.svg = canvas, ""

    def panels(self, count: int) -> list["Axes"]:
        """Return that many panels side by side, with a common vertical axis."""
        return list(self.canvas.subplots(1, count, sharey=True, squeeze=False)[0])

    def legend(self, columns: int | None = None) -> None:
        """Explain every labelled line below the panels, each label once; by default in one row."""
        lines = [line for panel in self.canvas.axes for line in panel.get_lines()]
        handles = {line.get_label(): line for line in lines if not str(line.get_label()).startswith("_")}
        self.canvas.legend(handles=list(handles.values()), loc="outside lower center", ncols=columns or len(handles))


@contextmanager
def drawing(name: str, alt: str, *, height: float, width: float = WIDTH) -> Iterator[Picture]:
    """Yield a picture, and turn it into SVG afterwards. matplotlib's global state stays as it is.

    Args:
        name: prefix of the ids in the SVG, unique on the page.
        alt: the plot in words, for readers who cannot see it.
        height: in inches.
        width: in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change the report
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        picture = Picture(Figure(figsize=(width, height), layout="constrained", facecolor="none"))
        yield picture
        for panel in picture.canvas.axes:
            panel.set_facecolor("none")
        buffer = io.StringIO()
        picture.canvas.savefig(buffer, format="svg", metadata={"Date": None})
        picture.svg = _inline(buffer.getvalue(), name, alt)


def _inline(svg: str, name: str, alt: str) -> str:
    """Turn a standalone SVG into a part of the page: unique ids, the page's colours and typeface, alt text."""
    variables = {colour: f"var(--{variable.replace('_', '-')})" for variable, colour in COLOURS.items()}
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"#0000[0-9a-f]{2}\b", lambda colour: variables[colour[0]], svg)
    svg = re.sub(r"font: ((?:bold |[67]00 )?)([\d.]+)px [^;\"]*", r"font-weight: \1; font-size: \2px", svg)
    svg = re.sub(r" ?font-family: [^;\"]*;", "", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(alt)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip()
