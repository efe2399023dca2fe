"""Inline SVG plots that follow the page: its colours (light or dark) and its typeface. Equal data give equal bytes.

matplotlib draws with sentinel colours, which are then replaced by the page's CSS variables.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from rarec.evaluation.labels import ID_ONLY, base_variant, figure, metric_title, tick, variant_title
from rarec.evaluation.run_files import Row, TrainingRecord
from rarec.evaluation.verdict import Finding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
}
_OUTCOMES = {"beats": "#00000b", "loses": "#00000c", "open": MUTED}
THEME = {INK: "ink", MUTED: "muted", RULE: "rule", SURFACE: "surface", "#00000b": "good", "#00000c": "bad"} | {
    colour: variant.replace("_", "-") for variant, colour in COLOURS.items()
}
"""Sentinel colours and the CSS variables that stand for them on the page."""
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
"""Of a full plot, in inches."""
_POINTS = 160
"""Most points of a loss curve: each is the mean of its share of the steps."""


def forest(metrics: Sequence[Row], variants: Sequence[str], names: Sequence[str]) -> str:
    """Every variant's value and interval, one panel a metric; the ID model's interval is the grey band."""
    cells = {(row["variant"], row["metric"]): row for row in metrics}
    lines = [
        f"{variant_title(variant)} {metric_title(name)} {figure(cells[variant, name]['value'])}"
        for name in names[:1]
        for variant in variants
        if (variant, name) in cells
    ]
    alt = f"Values with 95% intervals of {len(variants)} variants in {len(names)} metrics. {'; '.join(lines)}."
    with drawing("forest", alt, height=0.75 + 0.27 * len(variants)) as (canvas, made):
        panels = canvas.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, names, strict=True):
            band = cells.get((ID_ONLY, name))
            if band:
                panel.axvspan(band["low"], band["high"], color=RULE, alpha=0.55, linewidth=0)
            for height, variant in enumerate(reversed(variants)):
                row = cells.get((variant, name))
                if row:
                    _whisker(panel, variant, row["value"], height, (row["low"], row["high"]))
            panel.set_title(metric_title(name))
            panel.grid(axis="y", visible=False)
            panel.locator_params(axis="x", nbins=4)
            panel.xaxis.set_major_formatter(lambda value, _: tick(value))
        panels[0].set_yticks(range(len(variants)), [variant_title(variant) for variant in reversed(variants)])
        panels[0].set_ylim(-0.6, len(variants) - 0.4)
    return made[0]


def differences(findings: Sequence[Finding]) -> str:
    """Paired differences of one metric with their intervals, against the line of no difference."""
    labels = [f"{variant_title(f.variant)} vs {variant_title(f.baseline)}" for f in findings]
    lines = [f"{label} {f.evidence()}, {f.reading}" for label, f in zip(labels, findings, strict=True)]
    alt = f"Paired differences with 95% intervals. {'; '.join(lines)}."
    with drawing("differences", alt, height=0.75 + 0.26 * len(findings)) as (canvas, made):
        panel = canvas.subplots()
        panel.axvline(0, color=INK, linewidth=1)
        for height, finding in enumerate(reversed(findings)):
            colour = _OUTCOMES[finding.outcome]
            panel.plot([finding.low, finding.high], [height, height], color=colour, linewidth=1.8)
            panel.plot(finding.difference, height, "o", color=colour, markersize=5)
        panel.set_yticks(range(len(findings)), reversed(labels))
        panel.set_ylim(-0.6, len(findings) - 0.4)
        panel.grid(axis="y", visible=False)
        panel.set_xlabel(f"difference in {metric_title(findings[0].metric)} (right of zero: the first is better)")
        panel.xaxis.set_major_formatter(lambda value, _: tick(value, signed=True))
    return made[0]


def curves(training: Mapping[str, TrainingRecord], metric: str) -> str:
    """Losses over steps, and the validation metric with the kept step marked."""
    panels = {
        "recommendation loss": {variant: _series(r.losses, "recommendation") for variant, r in training.items()},
        "alignment loss": {variant: _series(r.losses, "align") for variant, r in training.items()},
        f"validation {metric_title(metric)}": {variant: _validation(r, metric) for variant, r in training.items()},
    }
    shown = {title: {variant: s for variant, s in lines.items() if s[0]} for title, lines in panels.items()}
    shown = {title: lines for title, lines in shown.items() if lines}
    alt = f"Curves over training steps of {', '.join(map(variant_title, training))}: {', '.join(shown)}."
    with drawing("curves", alt, height=2.9) as (canvas, made):
        axes = canvas.subplots(1, len(shown), squeeze=False)[0]
        for panel, (title, lines) in zip(axes, shown.items(), strict=True):
            for variant, (steps, values) in lines.items():
                validated = title.startswith("validation")
                _line(panel, variant, steps, values, training[variant].done.get("best_step") if validated else None)
            panel.set_title(title)
            panel.set_xlabel("step")
            panel.yaxis.set_major_formatter(lambda value, _: tick(value))
            panel.locator_params(axis="x", nbins=5, integer=True)
        handles = {h.get_label(): h for panel in axes for h in panel.get_lines() if not h.get_label().startswith("_")}
        canvas.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles))
    return made[0]


def strata(rows: Sequence[Row], stratum: str, metric: str, variants: Sequence[str]) -> str:
    """A metric by bucket of users or items, the variants side by side, each with its interval."""
    buckets = {row["bucket"]: row for row in sorted(rows, key=lambda row: row["order"])}
    place = {bucket: index for index, bucket in enumerate(buckets)}
    lines = [
        f"{variant_title(r['variant'])} at {r['bucket']}: {figure(r['value'])}"
        for r in rows
        if r["variant"] in variants
    ]
    alt = f"{metric_title(metric)} by {stratum}, with 95% intervals. {'; '.join(lines)}."
    with drawing(f"strata-{stratum.replace(' ', '-')}", alt, width=WIDTH / 2, height=2.9) as (canvas, made):
        panel = canvas.subplots()
        for row in rows:
            if row["variant"] in variants:
                shift = (variants.index(row["variant"]) - (len(variants) - 1) / 2) * 0.64 / len(variants)
                where = place[row["bucket"]] + shift
                _whisker(panel, row["variant"], row["value"], where, (row["low"], row["high"]), upright=True)
        panel.set_xticks(range(len(buckets)), [f"{name}\nn={row['n']:,}" for name, row in buckets.items()])
        panel.set_title(f"{metric_title(metric)} by {stratum}")
        panel.grid(axis="x", visible=False)
        panel.yaxis.set_major_formatter(lambda value, _: tick(value))
        handles = [_key(panel, variant) for variant in variants]
        canvas.legend(handles=handles, loc="outside lower center", ncols=min(2, len(variants)))
    return made[0]


def _whisker(
    panel: "Axes", variant: str, value: float, where: float, ends: tuple[float, float], upright: bool = False
) -> None:
    colour = _colour(variant)
    along, across = list(ends), [where, where]
    line, point = ((across, along), (where, value)) if upright else ((along, across), (value, where))
    panel.plot(*line, color=colour, linewidth=1.6)
    panel.plot(*point, "o", color=colour, markerfacecolor=SURFACE if "+" in variant else colour, markersize=5)


def _key(panel: "Axes", variant: str) -> Any:
    face = SURFACE if "+" in variant else _colour(variant)
    return panel.plot(
        [], [], "o-", color=_colour(variant), markerfacecolor=face, markersize=5, label=variant_title(variant)
    )[0]


def _line(panel: "Axes", variant: str, steps: list[float], values: list[float], best: int | None) -> None:
    panel.plot(steps, values, color=_colour(variant), linewidth=1.6, label=variant_title(variant))
    if best in steps:
        panel.plot(best, values[steps.index(best)], "o", color=_colour(variant), markersize=5)


def _series(lines: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values, thinned to the means of equal shares of the steps; nothing where the value is always zero."""
    known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if not any(value for _, value in known):
        return [], []
    size = -(-len(known) // _POINTS)
    shares = [known[start : start + size] for start in range(0, len(known), size)]
    means = [[sum(column) / len(share) for column in zip(*share, strict=True)] for share in shares]
    return [step for step, _ in means], [value for _, value in means]


def _validation(record: TrainingRecord, metric: str) -> tuple[list[float], list[float]]:
    known = [(line["step"], line["validation"].get(metric)) for line in record.validations]
    return [s for s, v in known if v is not None], [v for _, v in known if v is not None]


def _colour(variant: str) -> str:
    return COLOURS.get(base_variant(variant), INK)


@contextmanager
def drawing(name: str, alt: str, *, height: float, width: float = WIDTH) -> Iterator[tuple["Figure", list[str]]]:
    """A figure to draw on, and a list that holds its SVG once it is drawn. No global state of matplotlib is touched."""
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
    """A standalone SVG as part of the page: its ids apart from other plots', its look the page's, with alt text."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"#0000[0-9a-f]{2}\b", lambda found: f"var(--{THEME[found[0]]})", svg)
    svg = re.sub(r"font: ((?:bold |[67]00 )?)([\d.]+)px [^;\"]*", r"font-weight: \1; font-size: \2px", svg)
    svg = re.sub(r" ?font-family: [^;\"]*;", "", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(alt)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1).strip()


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
