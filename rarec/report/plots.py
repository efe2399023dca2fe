"""The plots of the report, each as inline SVG."""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rarec.evaluation.findings import Finding
from rarec.evaluation.labels import ID_ONLY, MINUS, base_variant, figure, metric_title, tick, variant_title
from rarec.evaluation.run_files import Row, TrainingRecord
from rarec.report.svg import COLOURS, INK, MUTED, OUTCOMES, RULE, SURFACE, WIDTH, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NARROW = 24
"""Letters in a line of the title of a narrow panel."""
_POINTS = 160
"""Most points of a loss curve; each is the mean over an equal share of the steps."""
Lines = Mapping[str, tuple[str, str]]
"""From a line's label to the field that it shows and its colour."""
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


def forest(metrics: Sequence[Row], variants: Sequence[str], names: Sequence[str]) -> str:
    """Plot every variant's value and interval, one panel per metric; a grey band marks the ID model's interval.

    Args:
        metrics: rows of metrics.json.
        variants: row names, from top to bottom.
        names: metrics, from left to right.
    """
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
    """Plot paired differences in one metric with their intervals."""
    labels = [f"{variant_title(f.variant)} vs {variant_title(f.baseline)}" for f in findings]
    lines = [f"{label} {f.evidence()}, {f.reading}" for label, f in zip(labels, findings, strict=True)]
    alt = f"Paired differences with 95% intervals. {'; '.join(lines)}."
    with drawing("differences", alt, height=0.75 + 0.26 * len(findings)) as (canvas, made):
        panel = canvas.subplots()
        panel.axvline(0, color=INK, linewidth=1)
        for height, finding in enumerate(reversed(findings)):
            colour = OUTCOMES[finding.outcome]
            panel.plot([finding.low, finding.high], [height, height], color=colour, linewidth=1.8)
            panel.plot(finding.difference, height, "o", color=colour, markersize=5)
        panel.set_yticks(range(len(findings)), reversed(labels))
        panel.set_ylim(-0.6, len(findings) - 0.4)
        panel.grid(axis="y", visible=False)
        panel.set_xlabel(f"difference in {metric_title(findings[0].metric)} (right of zero: the first is better)")
        panel.xaxis.set_major_formatter(lambda value, _: tick(value, signed=True))
    return made[0]


def curves(training: Mapping[str, TrainingRecord], metric: str) -> str:
    """Plot losses over steps, and the validation metric with a point at the best step.

    Args:
        training: trainings by variant.
        metric: the validation metric that chose the best step.
    """
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
    """Plot a metric by bucket of users or items, variants side by side, each with its interval.

    Args:
        rows: rows of strata.json, of one stratum and metric.
        stratum: its name.
        metric: its metric.
        variants: row names, from left to right.
    """
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


def slots_gain(rows: Sequence[Row]) -> str:
    """Plot what the slots add by bucket of users or items, one panel per stratum.

    Args:
        rows: rows of strata.json of one difference and metric.
    """
    one, other = (variant_title(name) for name in rows[0]["variant"].split(MINUS))
    metric = metric_title(rows[0]["metric"])
    lines = [f"{row['stratum']} {row['bucket']}: {figure(row['value'], signed=True)}" for row in rows]
    alt = f"{metric} of {one} minus {other}, with 95% intervals. {'; '.join(lines)}."
    names = list(dict.fromkeys(row["stratum"] for row in rows))
    with drawing("slots-gain", alt, height=2.6) as (canvas, made):
        panels = canvas.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, names, strict=True):
            shown = sorted((row for row in rows if row["stratum"] == name), key=lambda row: row["order"])
            panel.axhline(0, color=INK, linewidth=1)
            for place, row in enumerate(shown):
                ends = row["low"], row["high"]
                colour = OUTCOMES["better" if ends[0] > 0 else "worse" if ends[1] < 0 else "inconclusive"]
                panel.plot([place, place], ends, color=colour, linewidth=1.8)
                panel.plot(place, row["value"], "o", color=colour, markersize=5)
            panel.set_xticks(range(len(shown)), [row["bucket"] for row in shown])
            panel.set_xlim(-0.5, len(shown) - 0.5)
            panel.set_title(fill(name, NARROW))
            panel.grid(axis="x", visible=False)
            panel.yaxis.set_major_formatter(lambda value, _: tick(value, signed=True))
        panels[0].set_ylabel(f"{metric}, difference")
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
    """Return steps and values, as means over equal shares of the steps; empty lists where the value is always zero."""
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
    alt = f"{title[0].upper()}{title[1:]}. {'; '.join(_ends(lines, own, place) for place, own in panels.items())}."
    with drawing(f"alignment-{name}", alt, width=WIDTH / 2, height=2.6) as (canvas, made):
        axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, (place, own) in zip(axes, panels.items(), strict=True):
            for label, (field, colour) in lines.items():
                known = [(row["block"], row[field]) for row in own if row[field] is not None]
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
