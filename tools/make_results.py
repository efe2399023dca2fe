"""RESULTS.md, docs/results/ and README's figures, from the files of finished sweeps: no figure on them is typed.

    python -m tools.make_results collect configs/sweeps/demo.yaml    # finished runs -> results/demo.json
    python -m tools.make_results                                     # results/ -> the pages

`results/` has a file of figures for each sweep (`collect_results.py`), and in `results/text/` the words around them:

- `RESULTS.md` becomes RESULTS.md.
- `SWEEP.md` becomes docs/results/SWEEP.md, with the sweep's tables where `<!-- results: TABLE -->` stands: `settings`,
  `figures`, `differences`, `against RUN` (the other runs minus this one), `strata` and `overlap` (of the first run),
  `curves`, `missing` or `making`. Tables that the text does not place follow at its end.
- `blocks/NAME.md` is put wherever README.md, or a text, has `<!-- results: NAME -->`. In README.md it fills what is
  between that marker and `<!-- /results -->`; instead of NAME there may be a figure: `<!-- results: {{...}} -->`.

Figures stand in double braces (`results_figures.py`). Pictures of some figures, and of a difference by stratum:

    <!-- plot: FILE METRIC
    label = SWEEP:RUN:VARIANT
    -->
    <!-- strata plot: FILE SWEEP:RUN:VARIANT - BASELINE -->
"""

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rarec.cluster.definition import load_sweep
from rarec.console.last_resort import guarded
from rarec.errors import UserError
from rarec.evaluation.results import FUSED, ID_ONLY, MINUS
from rarec.storage.files import write_text
from tools.collect_results import collect
from tools.results_figures import Figures, Line, colours, curve_svg, naming, rows_svg, strata_svg
from tools.results_statistics import HITS
from tools.results_tables import Tables, minus

TITLES = {
    "settings": "Runs",
    "figures": "Figures",
    "differences": "Paired differences",
    "against": "Against the base",
    "strata": "By history and popularity",
    "overlap": "Who hits",
    "curves": "Curves",
    "missing": "Missing",
    "making": "How it was made",
}
BEFORE = {
    "overlap": "Share of users by who has the target in the first hundred; behind the comma, the fusion as well.\n\n"
}
PLACE = Path("docs/results")
"""Of the pages of sweeps and of all pictures."""
_MARKER = re.compile(r"<!-- results: (?P<block>[\w-]+)(?: (?P<run>\S+))? -->")
_MARKER_IN_README = re.compile(r"<!-- results: ")
_FILLED = re.compile(
    r"(?P<open><!-- results: (?P<what>[\w-]+|\{\{.+?\}\}) -->)(?P<old>.*?)(?P<close><!-- /results -->)", re.DOTALL
)
_STRATA_PLOT = re.compile(r"<!-- strata plot: (?P<name>[\w-]+) (?P<sweep>\w+):(?P<run>[^:]+):(?P<pair>.+?) -->")
_PLOT = re.compile(r"<!-- plot: (?P<name>[\w-]+) (?P<metric>\S+)\n(?P<rows>.+?)\n-->", re.DOTALL)

APART = (Path("RESULTS.md"), Path("docs/compare.md"))
"""Pages of several sweeps; their words have the same name."""


class Pages:
    """All pages that are made from `results/`, as their texts.

    Args:
        root: of the repository; `results/` and README.md are in it.

    Attributes:
        texts: of each page and picture, by its path from the root.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.words = root / "results" / "text"
        self.figures = Figures(root / "results")
        self.texts: dict[Path, str] = {}
        for sweep in self.figures.sweeps:
            self._sweep(sweep)
        for page in APART:
            if (self.words / page.name).exists():
                self.texts[page] = self._written(page, self.words / page.name, {})
        readme = root / "README.md"
        if readme.exists():
            self.texts[Path("README.md")] = self._filled(readme.read_text(encoding="utf-8"))

    def _sweep(self, sweep: str) -> None:
        """Make the page of a sweep."""
        page, words, tables = PLACE / f"{sweep}.md", self.words / f"{sweep}.md", Tables(self.figures, sweep)
        made = {name: getattr(tables, name)() for name in TITLES if name not in ("against", "curves")}
        made["curves"] = "\n".join(self._curves(sweep))
        made["against"] = tables.against("base") if "base" in tables.runs else ""
        self.texts[page] = self._written(page, words, made, tables)

    def _written(self, page: Path, words: Path, made: Mapping[str, str], tables: Tables | None = None) -> str:
        """Return the text of a page with its figures, pictures and tables; tables that it does not place come last."""
        text = words.read_text(encoding="utf-8") if words.exists() else f"# {page.stem}\n"
        placed = [match["block"] for match in _MARKER.finditer(text)]
        text = self.figures.cited(words, text, page.stem if made else "")
        text = _MARKER.sub(lambda match: self._placed(match, words, made, tables).rstrip("\n"), text)
        text = _PLOT.sub(lambda match: self._rows(page, words, match), text)
        text = _STRATA_PLOT.sub(lambda match: self._by_stratum(page, words, match), text)
        left = [block for block in TITLES if made.get(block) and block not in placed]
        rest = "".join(f"\n## {TITLES[block]}\n\n{BEFORE.get(block, '')}{made[block]}" for block in left)
        head = f"<!-- Made by tools/make_results.py from results/; words: {words.relative_to(self.root).as_posix()} -->"
        return f"{head}\n\n{text.strip()}\n{rest}"

    def _placed(self, match: re.Match[str], words: Path, made: Mapping[str, str], tables: Tables | None) -> str:
        """Return what a marker asks for: a table of the page's sweep, or a block."""
        block, run = match["block"], match["run"]
        if run is None:
            return made[block] if block in made else self._block(block, words)
        if tables is None or block != "against" or run not in tables.runs:
            known = ", ".join(tables.runs) if tables else "none on this page"
            raise UserError(f"{words}: {match[0]}: there is no run `{run}`", f"there are: {known}")
        return tables.against(run)

    def _block(self, name: str, where: Path) -> str:
        """Return a block of `blocks/` with its figures."""
        file = self.words / "blocks" / f"{name}.md"
        if not file.exists():
            known = sorted([*TITLES, *(each.stem for each in file.parent.glob("*.md"))])
            raise UserError(f"{where}: there is no block `{name}`", f"there are: {', '.join(known)}")
        return self.figures.cited(file, file.read_text(encoding="utf-8")).strip()

    def _filled(self, text: str) -> str:
        """Fill README's markers."""

        def put(match: re.Match[str]) -> str:
            what, readme = match["what"], Path("README.md")
            filled = self.figures.cited(readme, what) if what.startswith("{{") else self._block(what, readme)
            filled = f"\n{filled}\n" if "\n" in filled else filled
            return match["open"] + filled + match["close"]

        if len(_MARKER_IN_README.findall(text)) != len(_FILLED.findall(text)):
            raise UserError("README.md: a `<!-- results: ... -->` is not closed", "end it with <!-- /results -->")
        return _FILLED.sub(put, text)

    def _picture(self, page: Path, name: str, svg: str, title: str) -> str:
        """Keep a picture and return the Markdown that shows it on a page."""
        self.texts[PLACE / f"{name}.svg"] = svg
        return f"![{title}]({Path(os.path.relpath(PLACE / f'{name}.svg', page.parent)).as_posix()})"

    def _rows(self, page: Path, words: Path, match: re.Match[str]) -> str:
        """Draw the figures that a `plot` marker lists."""
        rows = []
        for line in match["rows"].splitlines():
            label, _, reference = (part.strip() for part in line.rpartition("="))
            with naming(f"{words}: plot {match['name']}: {line}"):
                if reference.count(":") < 2:
                    raise UserError("not a figure", "write label = SWEEP:RUN:VARIANT")
                sweep, run, variant = reference.rsplit(":", 2)
                rows.append((label, self.figures.interval(sweep, run, variant, match["metric"])))
        title = f"{match['metric'].upper()} of {', '.join(label for label, _ in rows)}"
        return self._picture(page, match["name"], rows_svg(rows, match["metric"]), title)

    def _by_stratum(self, page: Path, words: Path, match: re.Match[str]) -> str:
        """Draw the difference that a `strata plot` marker names."""
        with naming(f"{words}: strata plot {match['name']}"):
            strata = self.figures.strata(match["sweep"], match["run"], match["pair"])
        title = f"{HITS.upper()} of {minus(*match['pair'].split(MINUS))} by stratum"
        return self._picture(page, match["name"], strata_svg(strata, HITS), title)

    def _curves(self, sweep: str) -> Iterator[str]:
        """Draw a curve for each field over which alone some entries have a grid of two points or more."""
        entries: dict[str, dict[str, dict[Any, str]]] = {}
        for name, run in self.figures.sweep(sweep)["runs"].items():
            if len(run["grid"]) == 1:
                [(field, value)] = run["grid"].items()
                value = value if isinstance(value, int | float | str) else str(value)
                entries.setdefault(field, {}).setdefault(run["entry"], {})[value] = name
        for field, of_field in entries.items():
            drawn = {entry: points for entry, points in of_field.items() if len(points) > 1}
            if drawn:
                svg = curve_svg(list(self._lines(sweep, drawn)), field, HITS)
                title = f"{HITS.upper()} over {field}: {', '.join(drawn)}"
                yield self._picture(PLACE / f"{sweep}.md", f"{sweep}.{field}", svg, title) + "\n"

    def _lines(self, sweep: str, entries: Mapping[str, Mapping[Any, str]]) -> Iterator[Line]:
        """Yield the ID model of the first entry, and of each entry its main variant, alone and fused."""
        first = next(iter(entries.values()))
        wanted = [("ID model", ID_ONLY, 0, first)]
        for (entry, points), colour in zip(entries.items(), colours(), strict=False):
            main = self.figures.run(sweep, next(iter(points.values())))["main"]
            wanted += [(entry, main, colour, points), (f"{entry} + ID", main + FUSED, colour, points)]
        for label, variant, colour, points in wanted:
            if all(variant in self.figures.run(sweep, run)["figures"] for run in points.values()):
                intervals = {value: self.figures.interval(sweep, run, variant, HITS) for value, run in points.items()}
                yield Line(label, colour, variant.endswith(FUSED), intervals)


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect finished runs, or write the pages."""
    parser = argparse.ArgumentParser(description="The results pages from the files of finished sweeps.")
    commands = parser.add_subparsers(dest="command")
    collecting = commands.add_parser("collect", help="put a sweep's finished runs into results/")
    collecting.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    collecting.add_argument(
        "--ranks", nargs="*", default=[], metavar="RUN", help="keep the ranks of these runs as well"
    )
    options = parser.parse_args(arguments)
    root = Path.cwd()
    if options.command == "collect":
        for line in collect(load_sweep(options.sweep), root / "results", options.ranks):
            print(line)
    for page, text in Pages(root).texts.items():
        if not (root / page).exists() or (root / page).read_text(encoding="utf-8") != text:
            write_text(root / page, text)
            print(f"wrote {page}")


if __name__ == "__main__":
    guarded(main)
