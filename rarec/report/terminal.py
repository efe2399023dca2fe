"""The end of a run in the terminal: the table of variants and metrics, the best variant, and the next step."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from rarec.config import RunConfig
from rarec.evaluation.labels import (
    BOUNDS_GROUP,
    FULL,
    figure,
    metric_title,
    primary_metric,
    variant_group,
    variant_order,
    variant_title,
)
from rarec.evaluation.verdict import best_variant
from rarec.report.run_files import RunFiles, still_improving

Row = Mapping[str, Any]


def terminal_table(rows: Sequence[Row], metrics: Sequence[str], width: int) -> Table:
    """Return the table of variants and metrics under full ranking.

    Intervals are shown for every metric if the width allows it, else for the primary metric alone, else for none.

    Args:
        rows: rows of metrics.json; those of other protocols or metrics are left out, and
            fusions without one part and oracles.
        metrics: the columns, such as `ndcg@10`.
        width: columns of the terminal.
    """
    shown = [row for row in rows if row["protocol"] == FULL and variant_group(row["variant"]) != BOUNDS_GROUP]
    cells = {(row["variant"], row["metric"]): row for row in shown}
    variants = sorted({variant for variant, metric in cells if metric in metrics}, key=variant_order)
    with_interval = _with_interval(variants, metrics, width)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", caption=_caption(cells))
    table.add_column("")
    for metric in metrics:
        table.add_column(metric_title(metric), no_wrap=True)
    for index, variant in enumerate(variants):
        if index and variant_group(variant) != variant_group(variants[index - 1]):
            table.add_row()
        values = (_cell(cells.get((variant, metric)), metric in with_interval) for metric in metrics)
        table.add_row(Text(variant_title(variant)), *values)
    return table


def closing_lines(files: RunFiles, config: RunConfig) -> list[str]:
    """Return what a run's figures say: trainings that should go on, the best variant, what to deploy.

    Args:
        files: what the run left; see `read_run`.
        config: the run's configuration.
    """
    best = best_variant(files)
    if best is None:
        return []
    improving = still_improving(files.training, config)
    exported = config.export.variant or best.name
    other = [f"The bundle holds {variant_title(exported)}: leave out export.variant to export the best row."]
    return [*([improving] if improving else []), best.sentence, best.advice, *(other if exported != best.name else [])]


def _with_interval(variants: Sequence[str], metrics: Sequence[str], width: int) -> set[str]:
    """Return the metrics whose intervals fit."""
    name = max((len(variant_title(variant)) for variant in variants), default=0)
    value, with_interval = len("1.0000"), len(".0000 .0000–.0000")
    for shown in (set(metrics), {primary_metric(metrics)}):
        if name + sum(1 + (with_interval if metric in shown else value) for metric in metrics) <= width:
            return shown
    return set()


def _caption(cells: Mapping[tuple[str, str], Row]) -> str:
    users = sorted({row["n"] for row in cells.values()})
    if not users:
        return "no metrics"
    counted = " to ".join(f"{n:,}" for n in dict.fromkeys((users[0], users[-1])))
    return f"full catalogue, n={counted} test users, bootstrap 95% intervals"


def _cell(row: Row | None, with_interval: bool) -> Text:
    if row is None:
        return Text("")
    ends = (f" {figure(row['low'])}–{figure(row['high'])}", "dim") if with_interval else ""
    return Text.assemble(figure(row["value"]), ends)
