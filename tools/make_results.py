"""RESULTS.md from the files of finished sweeps: no figure on it is typed.

    python tools/make_results.py configs/sweeps/demo.yaml ...

Each sweep has a section, which is made anew; those of other sweeps stay. What the page needs of a finished run is kept
under `--kept` (see `results_kept.py`), where it is found when the run itself is gone or was made on another machine.

A sweep may have a page of its own beside its file, `configs/sweeps/NAME.md`, in which `<!-- results: BLOCK -->` stands
for what is generated: `figures`, `differences`, `against` (the others beside the run called `base`), `strata` and
`overlap` (of the first run), `curves`, `missing` or `making`. `<!-- results: against RUN -->` takes another run for the
base. Blocks that the page does not place follow at its end. `{{RUN:VARIANT METRIC}}` stands for a figure (see
`results_cited.py`). Entries with a grid over one field are drawn together, under `--kept` too.
"""

import argparse
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from results_cited import cited
from results_curve import METRIC, draw
from results_kept import Kept, changed, keep, kept
from results_tables import Variants, against, differences, figures, making, missing, overlap, strata

from rarec.entry import guarded
from rarec.errors import UserError
from rarec.evaluation.labels import metric_title
from rarec.files import write_text
from rarec.sweep import Sweep, SweepRun, first_to_do, load_sweep

HEAD = """# Results

Tables of runs, and the text's figures of their variants, are made by a tool from the files of their sweeps. By hand are
words, figures of parts of the users or of trainings, and what the text calls computed, tried or of an earlier commit.

The full catalogue is ranked; the user's earlier items are excluded, ties count against the model, choices are made on
validation users. A figure is the mean over seeds and users, with the bootstrap 95% interval over users of each user's
mean over seeds: it covers the draw of users, not that of seeds. Differences are paired over the same users, and not
corrected for their number.
"""
TITLES = {
    "figures": "Figures",
    "differences": "Paired differences",
    "against": "Against the base",
    "strata": "By history and popularity",
    "overlap": "HR@100 by who hits; behind the comma, by the fusion as well",
    "curves": "Curves",
    "missing": "Missing",
    "making": "How it was made",
}
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_SECTION = re.compile(r"^<!-- sweep: (.+) -->$", re.MULTILINE)
_MARKER = re.compile(r"<!-- results: ([\w-]+)(?:(?<=against) \S+)? -->")
_BASE = re.compile(r"<!-- results: against (\S+) -->")


def results(sweeps: Sequence[Path], place: Path, before: str = "") -> str:
    """The whole page.

    Args:
        sweeps: their files.
        place: where finished runs are kept and curves are drawn, each sweep in a directory of its own.
        before: the page as it was; its sections of other sweeps stay in their places.

    Raises:
        UserError: a sweep, its page or a file of a finished run is not as it should be, or the page is not one of ours.
    """
    _, *pairs = _SECTION.split(before)
    if before and not pairs:
        raise UserError("the page has no section of a sweep: it was written by another hand", "choose another --page")
    sections = dict(zip(pairs[::2], pairs[1::2], strict=True))
    for path in sweeps:
        how = f"Made by `python tools/make_results.py {shlex.quote(str(path))}`."
        sections[path.stem] = f"{section(load_sweep(path), place / path.stem)}\n{how}\n"
    parts = (f"\n<!-- sweep: {name} -->\n\n{text.strip()}\n" for name, text in sections.items())
    return HEAD + "\n" + "".join(_contents(sections.values())) + "".join(parts)


def _contents(sections: Iterable[str]) -> Iterator[str]:
    """A link to each section, as GitHub names its heading."""
    for title in (match[1] for text in sections if (match := _HEADING.search(text))):
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        yield f"- [{title}](#{anchor})\n"


def section(sweep: Sweep, place: Path) -> str:
    """One sweep's part of the page; what is finished here and now is kept first."""
    if "evaluate" not in sweep.stages:
        raise UserError(f"{sweep.path}: `stages` lacks evaluate: there are no figures", "add it, and run the sweep")
    left = {run.label: first_to_do(run.config, sweep.stages) for run in sweep.runs}
    for run in sweep.runs:
        if left[run.label] is None:
            keep(run, place)
    variants = _variants(sweep, place)
    if not variants:
        _refuse_older(sweep, place)
    page = sweep.path.with_suffix(".md")
    text = page.read_text(encoding="utf-8") if page.exists() else f"## {sweep.path.stem}\n"

    @cache
    def find(other: str) -> Mapping[str, Variants]:
        return (
            _variants(load_sweep(sweep.path.with_name(f"{other}.yaml")), place.with_name(other)) if other else variants
        )

    return placed(page, cited(page, text, find), _blocks(sweep, place, variants, left, _base(sweep, text)))


def _blocks(
    sweep: Sweep, place: Path, variants: Mapping[str, Variants], left: Mapping[str, str | None], base: str
) -> dict[str, str]:
    """What is generated, by its name in a page."""
    finished = [one for run in variants.values() for one in run.finished.values()]
    there = [one.run for one in finished]
    first = [one for one in finished if one.run.name == finished[0].run.name]
    return {
        "figures": figures(variants.values()),
        "differences": differences(list(variants.values())),
        "against": against(variants, base),
        "strata": strata(first),
        "overlap": overlap(first),
        "curves": "\n".join(_curves(sweep, variants, place)),
        "missing": missing([_lack(run, left[run.label], place) for run in sweep.runs if run not in there]),
        "making": making(sweep, finished),
    }


def _refuse_older(sweep: Sweep, place: Path) -> None:
    """Tables of runs that were made with other settings are not replaced by none."""
    older = {run.label: other for run in sweep.runs if (other := changed(run, place))}
    if older:
        label, other = next(iter(older.items()))
        raise UserError(
            f"{sweep.path}: none of its runs is finished, and what is kept in {place} was made with other settings, as "
            f"{label}: {'; '.join(other)}",
            "run the sweep, or make its section at the commit that it names",
        )


def _base(sweep: Sweep, text: str) -> str:
    """The run that the sweep's page wants the others compared with."""
    named = _BASE.search(text)
    if named and named[1] not in {run.name for run in sweep.runs}:
        raise UserError(f"{sweep.path.with_suffix('.md')}: {sweep.path} has no run `{named[1]}`", "as in its tables")
    return named[1] if named else "base"


def placed(page: Path, text: str, blocks: Mapping[str, str]) -> str:
    """The blocks where the sweep's own page wants them.

    Raises:
        UserError: the page has a marker for what there is not.
    """
    wanted = _MARKER.findall(text)
    unknown = [marker for marker in wanted if marker not in blocks]
    if unknown:
        raise UserError(f"{page}: there is no block `{unknown[0]}`", f"there are: {', '.join(blocks)}")
    text = _MARKER.sub(lambda marker: blocks[marker[1]].rstrip("\n"), text)
    rest = [f"\n### {TITLES[block]}\n\n{blocks[block]}" for block in blocks if block not in wanted and blocks[block]]
    return text.rstrip("\n") + "\n" + "".join(rest)


def _lack(run: SweepRun, stage: str | None, place: Path) -> str:
    """What is said of a run that is not on the page."""
    other = changed(run, place)
    older = f"; what is kept of it was made with other settings: {'; '.join(other)}" if other else ""
    return f"`{run.label}` is not finished: {stage} is next{older}"


def _variants(sweep: Sweep, place: Path) -> dict[str, Variants]:
    """Its runs over their finished seeds, by name, from what is kept."""
    seeds: dict[str, dict[int, Kept | None]] = {run.name: {} for run in sweep.runs}
    for run in sweep.runs:
        seeds[run.name][run.seed] = kept(run, place)
    found = {name: {seed: one for seed, one in of.items() if one is not None} for name, of in seeds.items()}
    return {name: Variants(name, finished, len(seeds[name])) for name, finished in found.items() if finished}


def _curves(sweep: Sweep, variants: Mapping[str, Variants], place: Path) -> Iterator[str]:
    """A plot for each field over which alone some entries have a grid, of those of which two points are finished."""
    entries: dict[str, dict[str, dict[Any, Variants]]] = {}
    for run in sweep.runs:
        if len(run.grid) == 1 and run.name in variants:
            [(field, value)] = run.grid.items()
            value = value if isinstance(value, int | float | str) else json.dumps(value)
            entries.setdefault(field, {}).setdefault(run.entry, {})[value] = variants[run.name]
    for field, of_field in entries.items():
        drawn = {entry: list(points.items()) for entry, points in of_field.items() if len(points) > 1}
        if drawn:
            file = place / f"{field}.svg"
            draw(file, field, drawn)
            yield f"![{metric_title(METRIC)} over {field}: {', '.join(drawn)}]({file.as_posix()})\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="RESULTS.md from the files of finished sweeps.")
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--page", type=Path, default=Path("RESULTS.md"), help="other sections of it stay as they are")
    parser.add_argument("--kept", type=Path, default=Path("results"), help="finished runs, and their curves")
    arguments = parser.parse_args()
    before = arguments.page.read_text(encoding="utf-8") if arguments.page.exists() else ""
    write_text(arguments.page, results(arguments.sweeps, arguments.kept, before))


if __name__ == "__main__":
    guarded(main)
