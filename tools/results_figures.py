"""Read the figures of sweeps, put them into texts, so that no figure is typed, and draw them as small SVGs.

A text cites a figure in double braces:

{{RUN:VARIANT METRIC}}                  .2699 (.2645 to .2751): the mean and its 95% interval
{{RUN:VARIANT - VARIANT METRIC}}        4.0 (3.7 to 4.3): a paired difference in points of .01
{{RUN:VARIANT - RUN:VARIANT METRIC}}    the same between two runs, over the users and seeds that both have
{{RUN:VARIANT METRIC in STRATUM}}       HR@100 of some of the users, as `met in training 0`; of a difference too
{{RUN users}}, {{RUN seeds}}            how many

RUN may be SWEEP:RUN for a run of another sweep. ` mean` at the end leaves out the interval, and several metrics with
commas between them become the cells of a table's row.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple, TypeVar

from rarec.errors import UserError
from rarec.evaluation.results import MINUS, figure, tick
from rarec.ranking.metrics import Interval
from rarec.storage.files import read_json
from tools.results_statistics import HITS, Summary

_BRACES = re.compile(r"\{\{(.+?)\}\}")
_FIGURE = re.compile(
    r"(?P<one>\S+:\S+)(?: - (?P<other>\S+))? (?P<metrics>[^\s,]+(?:,[^\s,]+)*)(?: in (?P<stratum>.+?))?(?P<mean> mean)?"
)
_COUNT = re.compile(r"(?P<run>\S+) (?P<count>users|seeds)")
FORMS = "{{RUN:VARIANT METRIC}}, {{RUN:VARIANT - VARIANT METRIC}}, {{RUN:VARIANT METRIC in STRATUM}} or {{RUN users}}"
T = TypeVar("T")
COLOURS = ("#7a7a7a", "#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#c08a2b")
"""The first is the ID model's."""
NARROW = 24
"""Letters in a line of the title of a narrow panel."""
BESIDE = 0.08
"""Horizontal distance between lines whose places are names."""
WIDE = 10
"""A field whose largest value is this many times its smallest has a logarithmic axis."""


class Figures:
    """The figures of all sweeps.

    Args:
        place: the directory of the sweeps' files.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.sweep: Callable[[str], Summary] = cache(self._read)

    @property
    def sweeps(self) -> list[str]:
        """The names of all sweeps."""
        return sorted(file.stem for file in self.place.glob("*.json"))

    def _read(self, name: str) -> Summary:
        _of(dict.fromkeys(self.sweeps), name, "sweep")
        return dict(read_json(self.place / f"{name}.json"))

    def run(self, sweep: str, run: str) -> Summary:
        """Return what is kept of one run."""
        return dict(_of(self.sweep(sweep)["runs"], run, "run"))

    def interval(self, sweep: str, run: str, variant: str, metric: str) -> Interval:
        """Return the mean of a metric with its interval."""
        return self._triple(sweep, _of(self.run(sweep, run)["figures"], variant, "variant"), metric)

    def difference(self, sweep: str, left: tuple[str, str], right: tuple[str, str], metric: str) -> Interval:
        """Return a paired difference of two (run, variant), of one run or of two runs of a sweep."""
        for run, variant in (left, right):
            self.interval(sweep, run, variant, metric)
        if left[0] == right[0]:
            pairs = self.run(sweep, left[0])["differences"]
            is_turned = MINUS.join((right[1], left[1])) in pairs
        else:
            pairs = self.across(sweep, left[0], right[0])["differences"]
            is_turned = MINUS.join((left[0], right[0])) not in self.sweep(sweep)["across"]
        pair = MINUS.join((right[1], left[1]) if is_turned else (left[1], right[1]))
        interval = self._triple(sweep, _of(pairs, pair, "difference"), metric)
        return negative(interval) if is_turned else interval

    def strata(self, sweep: str, run: str, variant: str) -> dict[str, dict[str, Interval]]:
        """Return a row of HR@100, such as the difference `VARIANT - BASELINE`, of each seed by `STRATUM BUCKET`."""
        by_seed = {
            seed: {place: Interval(*cells[variant]) for place, cells in strata.items() if variant in cells}
            for seed, strata in self.run(sweep, run)["strata"].items()
        }
        if not any(by_seed.values()):
            raise UserError(f"{sweep}:{run} has no figures of `{variant}` by stratum", "evaluate it again, and collect")
        return by_seed

    def across(self, sweep: str, run: str, other: str) -> Summary:
        """Return what is kept of two runs of a sweep together, whichever of them is first.

        Raises:
            UserError: the two were not compared.
        """
        for name in (run, other):
            self.run(sweep, name)
        pairs = self.sweep(sweep)["across"]
        both = pairs.get(f"{run} - {other}") or pairs[f"{other} - {run}"]
        if "not_compared" in both:
            raise UserError(f"not compared: {both['not_compared']}", "compare runs of one split, on one machine")
        return dict(both)

    def _triple(self, sweep: str, values: Sequence[float], metric: str) -> Interval:
        metrics = self.sweep(sweep)["metrics"]
        index = 3 * _of({name: index for index, name in enumerate(metrics)}, metric, "metric")
        return Interval(*values[index : index + 3])

    def stratum(self, sweep: str, run: str, variant: str, stratum: str) -> Interval:
        """Return the `HITS` of a part of the users; of several seeds the mean alone, as both ends of the interval."""
        seeds = [
            Interval(*_of(_of(strata, stratum, "stratum"), variant, "variant"))
            for strata in self.run(sweep, run)["strata"].values()
        ]
        mean = sum(each.mean for each in seeds) / len(seeds)
        return seeds[0] if len(seeds) == 1 else Interval(mean, mean, mean)

    def cited(self, page: Path, text: str, sweep: str = "") -> str:
        """Put figures in the place of double braces.

        Args:
            page: named where something is wrong.
            text: of the page.
            sweep: the one that a run belongs to if the text names none.

        Raises:
            UserError: a figure does not exist, or is not cited in one of the forms above.
        """

        def put(match: re.Match[str]) -> str:
            with naming(f"{page}: {match[0]}"):
                return self._cited(match[1], sweep)

        return _BRACES.sub(put, text)

    def _cited(self, citation: str, sweep: str) -> str:
        count = _COUNT.fullmatch(citation)
        if count is not None:
            named, _, run = count["run"].rpartition(":")
            value = self.run(named or sweep, run)[count["count"]]
            return str(len(value)) if isinstance(value, list) else f"{value:,}"
        form = _FIGURE.fullmatch(citation)
        if form is None:
            raise UserError("not a figure", f"write {FORMS}")
        return " | ".join(self._figure(form, metric, sweep) for metric in form["metrics"].split(","))

    def _figure(self, form: re.Match[str], metric: str, sweep: str) -> str:
        sweep, run, variant = _parts(form["one"], sweep)
        mean = bool(form["mean"])
        if form["stratum"]:
            if metric != HITS:
                raise UserError(f"there is no `{metric}` by stratum", f"ask for {HITS}")
            row = MINUS.join((variant, form["other"])) if form["other"] else variant
            interval = self.stratum(sweep, run, row, form["stratum"])
            several = len(self.run(sweep, run)["seeds"]) > 1
            shown = points if form["other"] else cell
            return shown(interval, mean=mean or (interval.low == interval.high and several))
        if form["other"] is None:
            return cell(self.interval(sweep, run, variant, metric), mean=mean)
        other = form["other"] if ":" in form["other"] else f"{run}:{form['other']}"
        other_sweep, *right = _parts(other, sweep)
        if other_sweep != sweep:
            raise UserError("runs of two sweeps are not compared", "put both runs into one sweep")
        return points(self.difference(sweep, (run, variant), (right[0], right[1]), metric), mean=mean)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Name a place in the errors of the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error.problem}", error.remedy) from None


def cell(interval: Interval, *, signed: bool = False, mean: bool = False) -> str:
    """Format a figure and its interval as `.2699 (.2645 to .2751)`."""
    value, low, high = (figure(each, signed) for each in interval)
    return value if mean else f"{value} ({low} to {high})"


def points(interval: Interval, *, mean: bool = False) -> str:
    """Format a difference in points of .01 as `4.0 (3.7 to 4.3)`."""
    value, low, high = (_point(100 * each) for each in interval)
    return value if mean else f"{value} ({low} to {high})"


def _point(value: float) -> str:
    text = f"{value:.1f}"
    return text.replace("-", "" if float(text) == 0 else "\N{MINUS SIGN}")


def negative(interval: Interval) -> Interval:
    """Return the interval of b - a for that of a - b."""
    return Interval(-interval.mean, -interval.high, -interval.low)


def _parts(reference: str, sweep: str) -> tuple[str, str, str]:
    """Split `SWEEP:RUN:VARIANT`."""
    place, _, variant = reference.rpartition(":")
    named, _, run = place.rpartition(":")
    return named or sweep, run, variant


def _of(known: Mapping[str, T], name: str, kind: str) -> T:
    if name not in known:
        raise UserError(f"there is no {kind} `{name}`", f"there are: {', '.join(known)}")
    return known[name]


class Line(NamedTuple):
    """One line of a curve: the field's values, each with a figure.

    Attributes:
        label: in the legend.
        colour: index into `COLOURS`.
        dashed: for a fusion.
        points: value of the field -> figure.
    """

    label: str
    colour: int
    dashed: bool
    points: Mapping[Any, Interval]


def rows_svg(rows: Sequence[tuple[str, Interval]], metric: str) -> str:
    """Draw one row for each figure, with its interval; a line marks the first row's mean."""
    canvas, panel = _canvas(height=0.7 + 0.27 * len(rows), salt=metric)
    panel.axvline(rows[0][1].mean, color=COLOURS[0], linewidth=0.8, linestyle=":")
    for row, (_, interval) in enumerate(rows):
        ends = [[interval.mean - interval.low], [interval.high - interval.mean]]
        colour = COLOURS[1] if row else COLOURS[0]
        panel.errorbar([interval.mean], [row], xerr=ends, color=colour, marker="o", markersize=5, capsize=3)
    panel.set_yticks(range(len(rows)), [label for label, _ in rows])
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlabel(f"{metric.upper()}, 95% interval")
    _finish(panel, "x")
    return _svg(canvas)


def strata_svg(seeds: Mapping[str, Mapping[str, Interval]], metric: str) -> str:
    """Draw a difference by bucket of users or items, one panel for each stratum, the seeds side by side.

    Args:
        seeds: for each seed, the difference by `STRATUM BUCKET`.
        metric: its metric.
    """
    names = list(dict.fromkeys(place.rpartition(" ")[0] for strata in seeds.values() for place in strata))
    canvas, panels = _canvas(height=2.4, salt="strata", columns=len(names))
    for panel, name in zip(panels, names, strict=True):
        panel.axhline(0, color=COLOURS[0], linewidth=0.8)
        buckets: dict[str, None] = {}
        for number, (strata, colour) in enumerate(zip(seeds.values(), colours(), strict=False)):
            shown = {place.rpartition(" ")[2]: each for place, each in strata.items() if place.startswith(f"{name} ")}
            buckets |= dict.fromkeys(shown)
            places = [index + 2 * BESIDE * (number - (len(seeds) - 1) / 2) for index in range(len(shown))]
            for place, each in zip(places, shown.values(), strict=True):
                panel.plot([place, place], [each.low, each.high], color=COLOURS[colour], linewidth=1.2)
                panel.plot(place, each.mean, "o", color=COLOURS[colour], markersize=3.5)
        panel.set_xticks(range(len(buckets)), list(buckets), fontsize="x-small")
        panel.set_xlim(-0.5, len(buckets) - 0.5)
        panel.set_title(fill(name, NARROW), fontsize="medium")
        _finish(panel, "y", signed=True)
    panels[0].set_ylabel(f"{metric.upper()}, difference")
    return _svg(canvas)


def curve_svg(lines: Sequence[Line], field: str, metric: str) -> str:
    """Draw a metric over the field of a grid. Values that are no numbers have no order, so they are not joined."""
    values = list(dict.fromkeys(value for line in lines for value in line.points))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    values = sorted(values) if numbers else values
    place = {value: value if numbers else index for index, value in enumerate(values)}
    canvas, panel = _canvas(height=3.6, salt=field)
    for number, line in enumerate(lines):
        _plot(panel, line, place, None if numbers else BESIDE * (number - (len(lines) - 1) / 2))
    if numbers and values[0] > 0 and values[-1] >= WIDE * values[0]:
        panel.set_xscale("log")
    panel.set_xticks(list(place.values()), [f"{value:g}" if numbers else str(value) for value in values])
    panel.minorticks_off()
    panel.set(xlabel=field, ylabel=metric.upper())
    _finish(panel, "y")
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(canvas)


def colours() -> Iterator[int]:
    """Yield the colours of entries, without that of the ID model."""
    return cycle(range(1, len(COLOURS)))


def _plot(panel: Any, line: Line, place: Mapping[Any, float], beside: float | None) -> None:
    points = sorted(line.points.items(), key=lambda point: place[point[0]])
    means = [interval.mean for _, interval in points]
    ends = [
        [interval.mean - interval.low for _, interval in points],
        [interval.high - interval.mean for _, interval in points],
    ]
    joined = beside is None
    style = {"linestyle": ("--" if line.dashed else "-") if joined else "none", "marker": "o", "markersize": 4}
    style |= {} if joined or not line.dashed else {"markerfacecolor": "white"}
    places = [place[value] + (beside or 0.0) for value, _ in points]
    panel.errorbar(places, means, ends, color=COLOURS[line.colour], label=line.label, capsize=3, **style)


def _canvas(height: float, salt: str, columns: int = 0) -> tuple[Any, Any]:
    """Return an empty picture and its panel, or with `columns` a row of that many panels."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib, which is not installed", "pip install 'rarec[report]'") from None
    matplotlib.rcdefaults()  # a user's own matplotlibrc must not change the pages
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9})
    canvas = Figure(figsize=(7, height), layout="constrained", facecolor="white")
    return canvas, canvas.subplots(1, columns, sharey=True, squeeze=False)[0] if columns else canvas.subplots()


def _finish(panel: Any, axis: str, signed: bool = False) -> None:
    """Write the figures of an axis as the tables do, with light lines across."""
    getattr(panel, f"{axis}axis").set_major_formatter(lambda value, _: tick(value, signed=signed))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis=axis, color="#e2e2e2")


def _svg(canvas: Any) -> str:
    """Return the picture as text; equal figures give equal text."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"(\d+\.\d{2})\d+", r"\1", "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n")
