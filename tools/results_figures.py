"""Read the figures of sweeps and put them into texts, so that no figure is typed.

A text cites a figure in double braces:

{{RUN:VARIANT METRIC}}                  .2699 (.2645 to .2751): the mean and its 95% interval
{{RUN:VARIANT - VARIANT METRIC}}        4.0 (3.7 to 4.3): a paired difference in points of .01
{{RUN:VARIANT - RUN:VARIANT METRIC}}    the same between two runs, over the users and seeds that both have
{{RUN:VARIANT METRIC in STRATUM}}       HR@100 of some of the users, as `met in training 0`
{{RUN users}}, {{RUN seeds}}            how many

RUN may be SWEEP:RUN for a run of another sweep. ` mean` at the end leaves out the interval, and several metrics with
commas between them become the cells of a table's row.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from rarec.errors import UserError
from rarec.evaluation.labels import MINUS, figure
from rarec.ranking.intervals import Interval
from rarec.storage.files import read_json
from tools.collect_results import HITS, Summary

_BRACES = re.compile(r"\{\{(.+?)\}\}")
_FIGURE = re.compile(
    r"(?P<one>\S+:\S+)(?: - (?P<other>\S+))? (?P<metrics>[^\s,]+(?:,[^\s,]+)*)(?: in (?P<stratum>.+?))?(?P<mean> mean)?"
)
_COUNT = re.compile(r"(?P<run>\S+) (?P<count>users|seeds)")
FORMS = "{{RUN:VARIANT METRIC}}, {{RUN:VARIANT - VARIANT METRIC}}, {{RUN:VARIANT METRIC in STRATUM}} or {{RUN users}}"
Found = TypeVar("Found")


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

    def difference(self, sweep: str, one: tuple[str, str], other: tuple[str, str], metric: str) -> Interval:
        """Return a paired difference of two (run, variant), of one run or of two runs of a sweep."""
        if one[0] != other[0]:
            both = self.across(sweep, one[0], other[0])
            return self._triple(sweep, _of(both["differences"], f"{one[1]} - {other[1]}", "difference"), metric)
        for _, variant in (one, other):
            self.interval(sweep, one[0], variant, metric)
        found = self.run(sweep, one[0])["differences"]
        pair = f"{one[1]} - {other[1]}"
        if pair in found:
            return self._triple(sweep, found[pair], metric)
        return negative(self._triple(sweep, _of(found, f"{other[1]} - {one[1]}", "difference"), metric))

    def strata(self, sweep: str, run: str, variant: str) -> dict[str, dict[str, Interval]]:
        """Return a row of HR@100, such as the difference `VARIANT - BASELINE`, of each seed by `STRATUM BUCKET`."""
        found = {
            seed: {place: Interval(*cells[variant]) for place, cells in strata.items() if variant in cells}
            for seed, strata in self.run(sweep, run)["strata"].items()
        }
        if not any(found.values()):
            raise UserError(f"{sweep}:{run} has no figures of `{variant}` by stratum", "evaluate it again, and collect")
        return found

    def across(self, sweep: str, one: str, other: str) -> Summary:
        """Return the differences between the variants of two runs of a sweep.

        Raises:
            UserError: the two were not compared.
        """
        for run in (one, other):
            self.run(sweep, run)
        pairs = self.sweep(sweep)["across"]
        turned = f"{one} - {other}" not in pairs
        found = dict(pairs[f"{other} - {one}" if turned else f"{one} - {other}"])
        if "not_compared" in found:
            raise UserError(f"not compared: {found['not_compared']}", "compare runs of one split, on one machine")
        if turned:
            found["differences"] = {
                MINUS.join(reversed(pair.split(MINUS))): turn(values) for pair, values in found["differences"].items()
            }
        return found

    def _triple(self, sweep: str, values: Sequence[float], metric: str) -> Interval:
        metrics = self.sweep(sweep)["metrics"]
        at = 3 * _of({name: at for at, name in enumerate(metrics)}, metric, "metric")
        return Interval(*values[at : at + 3])

    def stratum(self, sweep: str, run: str, variant: str, stratum: str) -> Interval:
        """Return the `HITS` of a part of the users; of several seeds the mean alone, as both ends of the interval."""
        seeds = [
            Interval(*_of(_of(seed, stratum, "stratum"), variant, "variant"))
            for seed in self.run(sweep, run)["strata"].values()
        ]
        mean = sum(one.mean for one in seeds) / len(seeds)
        return seeds[0] if len(seeds) == 1 else Interval(mean, mean, mean)

    def cited(self, page: Path, text: str, sweep: str = "") -> str:
        """Put figures in the place of what stands in double braces.

        Args:
            page: named where something is wrong.
            text: of the page.
            sweep: the one that a run belongs to if the text names none.

        Raises:
            UserError: a figure does not exist, or is not asked for in one of the forms above.
        """

        def put(match: re.Match[str]) -> str:
            try:
                return self._cited(match[1], sweep)
            except UserError as error:
                raise UserError(f"{page}: {match[0]}: {error.problem}", error.remedy) from None

        return _BRACES.sub(put, text)

    def _cited(self, asked: str, sweep: str) -> str:
        count = _COUNT.fullmatch(asked)
        if count is not None:
            place, _, run = count["run"].rpartition(":")
            found = self.run(place or sweep, run)[count["count"]]
            return str(len(found)) if isinstance(found, list) else f"{found:,}"
        form = _FIGURE.fullmatch(asked)
        if form is None:
            raise UserError("not a figure", f"write {FORMS}")
        return " | ".join(self._one(form, metric, sweep) for metric in form["metrics"].split(","))

    def _one(self, form: re.Match[str], metric: str, sweep: str) -> str:
        place, run, variant = _parts(form["one"], sweep)
        if form["stratum"]:
            if metric != HITS:
                raise UserError(f"there is no `{metric}` by stratum", f"ask for {HITS}")
            found = self.stratum(place, run, variant, form["stratum"])
            alone = found.low == found.high
            return cell(found, mean=bool(form["mean"]) or (alone and len(self.run(place, run)["seeds"]) > 1))
        if form["other"] is None:
            return cell(self.interval(place, run, variant, metric), mean=bool(form["mean"]))
        other = form["other"] if ":" in form["other"] else f"{run}:{form['other']}"
        elsewhere, *pair = _parts(other, place)
        if elsewhere != place:
            raise UserError("runs of two sweeps are not compared", "put both runs into one sweep")
        return points(self.difference(place, (run, variant), (pair[0], pair[1]), metric), mean=bool(form["mean"]))


def cell(found: Interval, *, signed: bool = False, mean: bool = False) -> str:
    """Format a figure and its interval as `.2699 (.2645 to .2751)`."""
    value, low, high = (figure(each, signed) for each in found)
    return value if mean else f"{value} ({low} to {high})"


def points(found: Interval, *, mean: bool = False) -> str:
    """Format a difference in points of .01 as `4.0 (3.7 to 4.3)`."""
    value, low, high = (_point(100 * each) for each in found)
    return value if mean else f"{value} ({low} to {high})"


def _point(value: float) -> str:
    text = f"{value:.1f}"
    return text.replace("-", "" if float(text) == 0 else "\N{MINUS SIGN}")


def negative(found: Interval) -> Interval:
    """Return the interval of b - a for that of a - b."""
    return Interval(-found.mean, -found.high, -found.low)


def turn(values: Sequence[float]) -> list[float]:
    """Return `negative` of every metric."""
    return [each for at in range(0, len(values), 3) for each in negative(Interval(*values[at : at + 3]))]


def _parts(reference: str, sweep: str) -> tuple[str, str, str]:
    """Split `SWEEP:RUN:VARIANT`."""
    place, _, variant = reference.rpartition(":")
    named, _, run = place.rpartition(":")
    return named or sweep, run, variant


def _of(there: Mapping[str, Found], name: str, kind: str) -> Found:
    if name not in there:
        raise UserError(f"there is no {kind} `{name}`", f"there are: {', '.join(there)}")
    return there[name]


def listed_settings(run: Mapping[str, Any]) -> str:
    """List the fields in which a run differs from the base of its sweep."""
    fields = (f"`{field}: {json.dumps(value)}`" for field, value in run["settings"].items())
    return ", ".join(fields) or "nothing"
