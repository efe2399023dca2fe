"""The tables on the page of a sweep, from its file of figures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rarec.errors import UserError
from rarec.evaluation.results import FUSED, HEADLINE, ID_ONLY, LATE_FUSION, figure, variant_title
from rarec.evaluation.rows import pairs_of_interest
from rarec.ranking.metrics import Interval
from tools.results_figures import Figures, cell
from tools.results_statistics import HITS, Summary

_METRICS = [metric.upper() for metric in HEADLINE]
_UNKNOWN = "not recorded"


class Tables:
    """The generated parts of the page of a sweep.

    Args:
        figures: of all sweeps.
        sweep: the name of the page's sweep.
    """

    def __init__(self, figures: Figures, sweep: str) -> None:
        self.figures_of, self.sweep = figures, sweep
        self.runs: Mapping[str, Summary] = figures.sweep(sweep)["runs"]
        self.first = next(iter(self.runs))

    def settings(self) -> str:
        """Table the runs with the fields in which they differ from the base."""
        rows = [[name, listed_settings(run), _counts(run)[1]] for name, run in self.runs.items()]
        return table(["run", "differs from the base in", "seeds"], rows)

    def figures(self) -> str:
        """Table every variant of every run."""
        rows = [
            [name, variant_title(variant), *self._cells(name, variant), *_counts(run)]
            for name, run in self.runs.items()
            for variant in run["figures"]
        ]
        return table(["run", "variant", *_METRICS, "users", "seeds"], rows)

    def _cells(self, run: str, variant: str) -> list[str]:
        return [cell(self.figures_of.interval(self.sweep, run, variant, metric)) for metric in HEADLINE]

    def differences(self) -> str:
        """Table the pairs of interest of every run, and the first run's fusion minus those of other main variants."""
        rows = []
        for name, run in self.runs.items():
            for left, right in pairs_of_interest(run["figures"], run["main"]):
                rows.append([name, minus(left, right), *self._cells_of((name, left), (name, right)), *_counts(run)])
        main = self.runs[self.first]["main"]
        for name, run in self.runs.items():
            if run["main"] != main:
                left, right = main + FUSED, run["main"] + FUSED
                title = f"{self.first}, {name}"
                rows += self._across([title, minus(left, right)], (self.first, left), (name, right))
        return table(["run", "difference", *_METRICS, "users", "seeds"], rows)

    def against(self, base: str) -> str:
        """Table the main variant of each run, alone and fused, minus that of the run `base`."""
        rows = []
        for name, run in self.runs.items():
            for variant in (run["main"], run["main"] + FUSED) if name != base else ():
                head = [f"{name} minus {base}", variant_title(variant)]
                rows += self._across(head, (name, variant), (base, variant))
        return table(["difference", "variant", *_METRICS, "users", "seeds"], rows)

    def _cells_of(self, left: tuple[str, str], right: tuple[str, str]) -> list[str]:
        intervals = [self.figures_of.difference(self.sweep, left, right, metric) for metric in HEADLINE]
        return [cell(each, signed=True) for each in intervals]

    def _across(self, head: list[str], left: tuple[str, str], right: tuple[str, str]) -> list[list[str]]:
        """Return the row of a difference between two runs; none where one of them lacks the variant."""
        if any(variant not in self.runs[run]["figures"] for run, variant in (left, right)):
            return []
        try:
            both = self.figures_of.across(self.sweep, left[0], right[0])
        except UserError as error:
            return [[*head, error.problem, *[""] * (len(HEADLINE) + 1)]]
        return [[*head, *self._cells_of(left, right), f"{both['users']:,}", str(both["seeds"])]]

    def strata(self) -> str:
        """Table HR@100 of the first run's most important variants by stratum, for each seed."""
        run = self.runs[self.first]
        seeds = {seed: strata for seed, strata in run["strata"].items() if strata}
        names = {variant for strata in seeds.values() for cells in strata.values() for variant in cells}
        main = [ID_ONLY, "text_only", LATE_FUSION, run["main"], run["main"] + FUSED]
        shown = [variant for variant in dict.fromkeys(main) if variant in names]
        rows = [
            [f"{self.first}/seed-{seed}", stratum, *(_stratum(cells, name) for name in shown), f"{cells['users']:,}"]
            for seed, strata in seeds.items()
            for stratum, cells in strata.items()
        ]
        return table(["run", f"{HITS.upper()} where", *map(variant_title, shown), "users"], rows)

    def overlap(self) -> str:
        """Table who hits in the first run: the ID model, a variant, and their fusion."""
        run = self.runs[self.first]
        rows = [
            [f"{self.first}/seed-{seed}", variant_title(variant), *_pairs(shares), f"{run['users']:,}"]
            for seed, hits in run["hits"].items()
            for variant, shares in hits.items()
        ]
        head = ["run", "variant", "either", "both", "ID model alone", "variant alone", "neither", "users"]
        return table(head, rows)

    def missing(self) -> str:
        """List the runs of the sweep that were not finished."""
        lacks = self.figures_of.sweep(self.sweep)["missing"]
        return "".join(f"- `{label}` is not finished: {stage} is next\n" for label, stage in lacks.items())

    def making(self) -> str:
        """Table each run's commit, machine, time, steps and samples."""
        rows = [
            [f"{name}/seed-{seed}", *_made(made)]
            for name, run in self.runs.items()
            for seed, made in run["made"].items()
        ]
        how = f"Run one again: `rarec sweep {self.figures_of.sweep(self.sweep)['sweep']} --only RUN`.\n\n"
        return how + table(["run", "commit", "hardware", "wall time", "steps and samples seen"], rows)


def minus(left: str, right: str) -> str:
    """Return the title of a difference of two variants."""
    return f"{variant_title(left)} minus {variant_title(right)}"


def _counts(run: Mapping[str, Any]) -> list[str]:
    """Return the cells of users and seeds."""
    without = f" ({run['left_out']:,} left out)" if run["left_out"] else ""
    seeds = len(run["seeds"])
    return [f"{run['users']:,}{without}", f"{seeds} of {run['planned']}" if seeds < run["planned"] else f"{seeds}"]


def _stratum(cells: Mapping[str, Sequence[float]], variant: str) -> str:
    return cell(Interval(*cells[variant])) if variant in cells else ""


def _pairs(shares: Sequence[float]) -> Iterator[str]:
    for part, fused in zip(shares[::2], shares[1::2], strict=True):
        yield f"{figure(part)}, {figure(fused)}"


def _made(made: Mapping[str, Any]) -> list[str]:
    times = [
        f"{stage} {f'{seconds:,} s' if isinstance(seconds, int) else seconds}"
        for stage, seconds in made["seconds"].items()
    ]
    seen = [
        f"{variant_title(variant)}: {', '.join(_UNKNOWN if count is None else f'{count:,}' for count in counts)}"
        for variant, counts in made["trained"].items()
    ]
    commits = [f"`{commit}`" for commit in made["commits"]]
    return [*(", ".join(each) or _UNKNOWN for each in (commits, made["hardware"], times)), "; ".join(seen)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def listed_settings(run: Mapping[str, Any]) -> str:
    """List the fields in which a run differs from the base of its sweep."""
    fields = (f"`{field}: {json.dumps(value)}`" for field, value in run["settings"].items())
    return ", ".join(fields) or "nothing"
