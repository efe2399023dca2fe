"""The table that ends a run in the terminal: variants x metrics, with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from rarec.evaluation.labels import FULL, figure, metric_title, variant_group, variant_order, variant_title


def terminal_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Table:
    """Variants x metrics under full ranking; four metrics fit into 100 columns.

    Args:
        rows: of metrics.json; those of other protocols or metrics are left out.
        metrics: the columns, such as `ndcg@10`.
    """
    cells = {(row["variant"], row["metric"]): row for row in rows if row["protocol"] == FULL}
    variants = sorted({variant for variant, metric in cells if metric in metrics}, key=variant_order)
    users = sorted({row["n"] for row in cells.values()})
    counted = " to ".join(f"{n:,}" for n in (users[:1] if len(users) < 2 else (users[0], users[-1])))
    caption = f"full catalogue, n={counted} test users, bootstrap 95% intervals" if users else "no metrics"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", caption=caption)
    table.add_column("")
    for metric in metrics:
        table.add_column(metric_title(metric), no_wrap=True)
    for index, variant in enumerate(variants):
        if index and variant_group(variant) != variant_group(variants[index - 1]):
            table.add_row()
        table.add_row(Text(variant_title(variant)), *(_cell(cells.get((variant, metric))) for metric in metrics))
    return table


def _cell(row: Mapping[str, Any] | None) -> Text:
    if row is None:
        return Text("")
    return Text.assemble(figure(row["value"]), (f" {figure(row['low'])}–{figure(row['high'])}", "dim"))
