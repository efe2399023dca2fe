"""Plots of alignment diagnostics: figures by block, a panel for each side and source."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rarec.evaluation.plots import COLOURS, INK, MUTED, WIDTH, drawing
from rarec.evaluation.record import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Mapping[str, tuple[str, str]]
"""A line's label, to the figure that it shows and its colour."""
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


def every(diagnostics: Mapping[str, Any]) -> Iterator[str]:
    """An SVG of each kind of figure that there is."""
    blocks, attention = diagnostics["blocks"], diagnostics["attention"]
    kinds = (
        ("norms", "norm by block", NORMS, blocks),
        ("cka", "CKA with the text by block", CKA, blocks),
        ("attention", "attention of the text by block", ATTENTION, attention),
    )
    for name, title, lines, rows in kinds:
        if any(row[figure] is not None for row in rows for figure, _ in lines.values()):
            yield by_block(name, title, lines, rows)


def by_block(name: str, title: str, lines: Lines, rows: Sequence[Row]) -> str:
    """Lines over blocks, a panel for each side (and source, where rows have one); norms on a logarithmic scale."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(" ".join([row["side"], *([row["source"]] if "source" in row else [])]), []).append(row)
    alt = f"{title[0].upper()}{title[1:]}. {'; '.join(_told(lines, own, place) for place, own in panels.items())}."
    with drawing(f"alignment-{name}", alt, width=WIDTH / 2, height=2.6) as (canvas, made):
        axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, (place, own) in zip(axes, panels.items(), strict=True):
            for label, (figure, colour) in lines.items():
                known = [(row["block"], row[figure]) for row in own if row[figure] is not None]
                xy = ([block for block, _ in known], [value for _, value in known])
                panel.plot(*xy, "o-", color=colour, markersize=3.5, linewidth=1.6, label=label)
            panel.set_title(f"{title.partition(' by ')[0]}, {place}")
            panel.set_xlabel("block")
            panel.locator_params(axis="x", nbins=5, integer=True)
        if name == "norms":
            _logarithmic(axes)
        else:
            axes[0].set_ylim(bottom=min(0.0, axes[0].get_ylim()[0]))  # last, since it fixes the top as well
        handles = {line.get_label(): line for panel in axes for line in panel.get_lines() if len(line.get_xdata())}
        canvas.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles))
    return made[0]


def _logarithmic(axes: Sequence["Axes"]) -> None:
    """With ticks in plain figures, also where the norms span less than a decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    for panel in axes:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _told(lines: Lines, rows: Sequence[Row], place: str) -> str:
    """First and last block, for who cannot see the plot."""
    ends = {row["block"]: row for row in (rows[0], rows[-1])}
    known = [
        f"{label} {row[figure]:.3g} at block {block}"
        for label, (figure, _) in lines.items()
        for block, row in ends.items()
        if row[figure] is not None
    ]
    return f"{place}: {', '.join(known) or 'none'}"
