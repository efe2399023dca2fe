"""Inline SVG figures that take colours (light or dark) and typeface from the page. Equal data give equal bytes.

matplotlib draws with sentinel colours, which are then replaced by the page's CSS variables.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from rarec.evaluation.labels import ID_ONLY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE, SURFACE = "#000001", "#000002", "#000003", "#000004"
COLOURS = {
    ID_ONLY: "#000005",
    "text_only": "#000006",
    "prefix_only": "#000007",
    "input": "#000008",
    "per_layer": "#000009",
    "per_layer_lora": "#00000a",
    "readout": "#00000d",
    "text_lora": "#00000e",
}
OUTCOMES = {"better": "#00000b", "worse": "#00000c", "inconclusive": MUTED}
THEME = {INK: "ink", MUTED: "muted", RULE: "rule", SURFACE: "surface", "#00000b": "good", "#00000c": "bad"} | {
    colour: variant.replace("_", "-") for variant, colour in COLOURS.items()
}
"""From sentinel colours to CSS variables of the page."""
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


@contextmanager
def drawing(name: str, alt: str, *, height: float, width: float = WIDTH) -> Iterator[tuple["Figure", list[str]]]:
    """Yield a figure to draw on, and a list that holds its SVG afterwards. matplotlib's global state stays as it is.

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
        canvas = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        made: list[str] = []
        yield canvas, made
        for panel in canvas.axes:
            panel.set_facecolor("none")
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
        made.append(_inline(buffer.getvalue(), name, alt))


def _inline(svg: str, name: str, alt: str) -> str:
    """Turn a standalone SVG into a part of the page: unique ids, the page's colours and typeface, alt text."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"#0000[0-9a-f]{2}\b", lambda found: f"var(--{THEME[found[0]]})", svg)
    svg = re.sub(r"font: ((?:bold |[67]00 )?)([\d.]+)px [^;\"]*", r"font-weight: \1; font-size: \2px", svg)
    svg = re.sub(r" ?font-family: [^;\"]*;", "", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(alt)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip()
