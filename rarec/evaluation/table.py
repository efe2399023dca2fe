"""The table that ends a run in the terminal: arms x metrics, with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from rarec.evaluation.labels import FULL, arm_group, arm_order, arm_title, figure, metric_title


def terminal_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Table:
    """Arms x metrics under full ranking; four metrics fit into 100 columns.

    Args:
        rows: of metrics.json; those of other protocols or metrics are left out.
        metrics: the columns, such as `ndcg@10`.
    """
    cells = {(row["arm"], row["metric"]): row for row in rows if row["protocol"] == FULL}
    arms = sorted({arm for arm, metric in cells if metric in metrics}, key=arm_order)
    users = sorted({row["n"] for row in cells.values()})
    counted = " to ".join(f"{n:,}" for n in (users[:1] if len(users) < 2 else (users[0], users[-1])))
    caption = f"full catalogue, n={counted} test users, bootstrap 95% intervals" if users else "no metrics"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", caption=caption)
    table.add_column("")
    for metric in metrics:
        table.add_column(metric_title(metric), no_wrap=True)
    for index, arm in enumerate(arms):
        if index and arm_group(arm) != arm_group(arms[index - 1]):
            table.add_row()
        table.add_row(Text(arm_title(arm)), *(_cell(cells.get((arm, metric))) for metric in metrics))
    return table


def _cell(row: Mapping[str, Any] | None) -> Text:
    if row is None:
        return Text("")
    return Text.assemble(figure(row["value"]), (f" {figure(row['low'])}–{figure(row['high'])}", "dim"))
