"""Figures in the running text of a sweep's page, which are not typed there either.

{{RUN:VARIANT METRIC}}              .2699 (.2645 to .2751), the mean and its interval
{{RUN:VARIANT - VARIANT METRIC}}        4.0 (3.7 to 4.3), a paired difference in points of .01
{{RUN:VARIANT - RUN:VARIANT METRIC}}    of two runs, over the users and the seeds that both have
{{SWEEP:RUN:VARIANT METRIC}}        of another sweep, whose file lies beside this one's; in a difference said of each run
{{... METRIC mean}}             without the interval
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from results_tables import Variants, paired

from rarec.errors import UserError
from rarec.evaluation.labels import figure

_CITED = re.compile(r"\{\{(.+?)\}\}")
_FORM = re.compile(r"(?P<one>\S+)(?: - (?P<other>\S+))? (?P<metric>\S+?)(?P<mean> mean)?")
_FORMS = "{{RUN:VARIANT METRIC}}, {{RUN:VARIANT - VARIANT METRIC}} or with ` mean` at the end"
Found = TypeVar("Found")
Find = Callable[[str], Mapping[str, Variants]]


def cited(page: Path, text: str, find: Find) -> str:
    """The page with its figures.

    Args:
        page: told where something is wrong.
        text: of it.
        find: the finished runs of a sweep by its name, of the page's own by an empty one.

    Raises:
        UserError: a figure is asked for that there is not, or not in one of the forms above.
    """

    def put(match: re.Match[str]) -> str:
        try:
            return _cited(match[1], find)
        except UserError as error:
            raise UserError(f"{page}: {match[0]}: {error.problem}", error.remedy) from None

    return _CITED.sub(put, text)


def _cited(asked: str, find: Find) -> str:
    form = _FORM.fullmatch(asked)
    if form is None:
        raise UserError("not a figure", f"write {_FORMS}")
    run, variant = _variant(form["one"], find)
    if form["other"] is None:
        found, scale, decimals = run.means.figures(variant), 1, 4
    else:
        whole = form["other"] if ":" in form["other"] else f"{form['one'].rpartition(':')[0]}:{form['other']}"
        found, scale, decimals = paired(run, variant, *_variant(whole, find)).differences("ours", "theirs"), 100, 1
    mean, low, high = (figure(scale * value, decimals=decimals) for value in _of(found, form["metric"], "metric"))
    return mean if form["mean"] else f"{mean} ({low} to {high})"


def _variant(reference: str, find: Find) -> tuple[Variants, str]:
    """The run and the variant that `SWEEP:RUN:VARIANT` names."""
    place, _, variant = reference.rpartition(":")
    sweep, _, name = place.rpartition(":")
    run = _of(find(sweep), name, "finished run")
    _of(run.means.values, variant, "variant")
    return run, variant


def _of(there: Mapping[str, Found], name: str, kind: str) -> Found:
    if name not in there:
        raise UserError(f"there is no {kind} `{name}`", f"there are: {', '.join(there)}")
    return there[name]
