"""Markdown tables of `make_results.py`: figures, paired differences, what is missing, and how each run was made."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from results_kept import Kept

from rarec.config import RunConfig
from rarec.errors import UserError
from rarec.evaluation.labels import (
    FUSED,
    HEADLINE,
    ID_ONLY,
    LATE_FUSION,
    figure,
    metric_title,
    variant_order,
    variant_title,
)
from rarec.evaluation.result_rows import pairs_of_interest
from rarec.evaluation.seeds import SeedMeans
from rarec.ranking import Interval
from rarec.sweep import Sweep, SweepRun

STRATA_BY = "hr@100"
_UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Variants:
    """The variants of one run.

    Attributes:
        name: of the run.
        finished: by seed.
        seeds: how many it should have.
    """

    name: str
    finished: Mapping[int, Kept]
    seeds: int

    @cached_property
    def means(self) -> SeedMeans:
        """Over its finished seeds. With one seed they are the figures of its metrics.json, to the last digit."""
        return self._read(self.finished)

    def over(self, seeds: Sequence[int]) -> SeedMeans:
        """Means over some of them."""
        return self.means if len(seeds) == len(self.finished) else self._read(seeds)

    @property
    def main(self) -> str:
        """The variant that is exported, and compared with the others."""
        return self._config.export.variant

    def _read(self, seeds: Iterable[int]) -> SeedMeans:
        return SeedMeans.read([self.finished[s].ranks for s in seeds], self._config.evaluate.resamples, self._first)

    @property
    def _first(self) -> int:
        return next(iter(self.finished))

    @property
    def _config(self) -> RunConfig:
        return self.finished[self._first].run.config

    @property
    def shown(self) -> list[str]:
        """All of them, in the order of every report."""
        return sorted(self.means.values, key=variant_order)

    @property
    def counts(self) -> list[str]:
        """Cells: users and seeds."""
        of = f" of {self.seeds}" if self.means.seeds < self.seeds else ""
        without = f" ({self.means.left_out:,} left out)" if self.means.left_out else ""
        return [f"{self.means.n:,}{without}", f"{self.means.seeds}{of}"]


def figures(runs: Iterable[Variants]) -> str:
    """Runs and variants x metrics."""
    rows = []
    for run in runs:
        for variant in run.shown:
            found = run.means.figures(variant)
            rows.append([run.name, variant_title(variant), *(_cell(found[metric]) for metric in HEADLINE), *run.counts])
    return _table(["run", "variant", *map(metric_title, HEADLINE), "users", "seeds"], rows)


def differences(runs: Sequence[Variants]) -> str:
    """The main variant, alone and fused, against its baselines; the first run's fusion against those of runs with another."""
    rows = []
    for run in runs:
        for variant, baseline in pairs_of_interest(run.shown, run.main):
            found = run.means.differences(variant, baseline)
            pair = f"{variant_title(variant)} minus {variant_title(baseline)}"
            rows.append([run.name, pair, *(_cell(found[metric], signed=True) for metric in HEADLINE), *run.counts])
    for other in (run for run in runs if run.main != runs[0].main):
        pair = f"{variant_title(runs[0].main + FUSED)} minus {variant_title(other.main + FUSED)}"
        cells = _across(runs[0], runs[0].main + FUSED, other, other.main + FUSED)
        rows += [[f"{runs[0].name}, {other.name}", pair, *cells]] if cells else []
    return _table(["run", "difference", *map(metric_title, HEADLINE), "users", "seeds"], rows)


def against(runs: Mapping[str, Variants], base: str) -> str:
    """The main variant of each run, alone and fused, against that of the run called `base`; nothing without one."""
    rows = []
    for run in (run for name, run in runs.items() if name != base and base in runs):
        for variant in (run.main, run.main + FUSED):
            cells = _across(run, variant, runs[base], variant)
            rows += [[f"{run.name} minus {base}", variant_title(variant), *cells]] if cells else []
    return _table(["difference", "variant", *map(metric_title, HEADLINE), "users", "seeds"], rows) if rows else ""


def _across(run: Variants, variant: str, other: Variants, others: str) -> list[str]:
    """Cells of a variant minus one of another run, over the seeds that both have; none where either lacks its own."""
    if variant not in run.means.values or others not in other.means.values:
        return []
    try:
        both = paired(run, variant, other, others)
    except UserError as error:
        return [f"not compared: {error.problem}", *[""] * (len(HEADLINE) + 1)]
    found = both.differences("ours", "theirs")
    return [*(_cell(found[metric], signed=True) for metric in HEADLINE), f"{both.n:,}", str(both.seeds)]


def paired(run: Variants, variant: str, other: Variants, others: str) -> SeedMeans:
    """A variant as `ours` and one of another run as `theirs`, over the users and the seeds that both have.

    Raises:
        UserError: they have none in common, or other targets.
    """
    seeds = [seed for seed in run.finished if seed in other.finished]
    if not seeds:
        raise UserError("no seed in common", "finish both runs with one")
    return run.over(seeds).against(other.over(seeds), variant, others)


def strata(seeds: Sequence[Kept]) -> str:
    """HR@100 by history length and by the target's popularity, of the variants of a run that matter most, seed by seed."""
    rows = [row for one in seeds for row in one.strata if row["metric"] == STRATA_BY]
    main = seeds[0].run.config.export.variant if seeds else ""
    there = {row["variant"] for row in rows}
    variants = [
        variant
        for variant in dict.fromkeys([ID_ONLY, "text_only", LATE_FUSION, main, main + FUSED])
        if variant in there
    ]
    lines = [[one.run.label, *cells] for one in seeds for cells in _strata_of(one, variants)]
    head = ["run", metric_title(STRATA_BY) + " where", *map(variant_title, variants), "users"]
    return _table(head, lines) if lines else ""


def _strata_of(one: Kept, variants: Sequence[str]) -> Iterator[list[str]]:
    cells = {(row["stratum"], row["bucket"], row["variant"]): row for row in one.strata if row["metric"] == STRATA_BY}
    for stratum, bucket in dict.fromkeys(place[:2] for place in cells):
        found = [cells[stratum, bucket, variant] for variant in variants]
        shown = [_cell(Interval(row["value"], row["low"], row["high"])) for row in found]
        yield [f"{stratum} {bucket}", *shown, f"{found[0]['n']:,}"]


def overlap(seeds: Iterable[Kept]) -> str:
    """Who hits among the first hundred, the ID model or a variant of a run, and how much of it their fusion hits."""
    lines = []
    for one in seeds:
        hits = {variant: values[STRATA_BY] > 0 for variant, values in SeedMeans.read([one.ranks]).values.items()}
        for variant in sorted(
            (variant for variant in hits if variant + FUSED in hits and ID_ONLY in hits), key=variant_order
        ):
            ids, own, fused = hits[ID_ONLY], hits[variant], hits[variant + FUSED]
            parts = (ids | own, ids & own, ids & ~own, own & ~ids, ~(ids | own))
            cells = [f"{figure(part.mean())}, {figure((fused & part).mean())}" for part in parts]
            lines.append([one.run.label, variant_title(variant), *cells, f"{len(ids):,}"])
    head = ["run", "variant", "either", "both", "ID model alone", "variant alone", "neither", "users"]
    return _table(head, lines) if lines else ""


def missing(lacks: Iterable[str]) -> str:
    """Every run that is not on the page, and why."""
    return "".join(f"- {lack}\n" for lack in lacks) or "Every run of the sweep is finished.\n"


def making(sweep: Sweep, finished: Sequence[Kept]) -> str:
    """Of each finished run: its command, its commit, time, machine, steps and samples."""
    rows = [[one.run.label, _command(sweep, one.run), *_record(sweep, one), _seen(one)] for one in finished]
    return _table(["run", "command", "commit", "hardware", "wall time", "steps and samples seen"], rows)


def _command(sweep: Sweep, run: SweepRun) -> str:
    return f"`rarec sweep {shlex.quote(str(sweep.path))} --only {shlex.quote(run.label)}`"


def _record(sweep: Sweep, one: Kept) -> list[str]:
    """Cells: commit, hardware, and wall time by stage."""
    stages = [sitting for stage in one.record.values() for sitting in (*stage.get("earlier", []), stage)]
    commits = [f"`{_short(stage['commit'])}`" if stage["commit"] else stage["version"] for stage in stages]
    machines = [stage["hardware"] + (f" x {stage['ranks']}" if stage["ranks"] > 1 else "") for stage in stages]
    shares = bool(one.run.config.run.shared)
    times = [f"{stage} {_time(one.record, stage, shares)}" for stage in sweep.stages if stage != "report"]
    return [_each(commits), _each(machines), ", ".join(times)]


def _time(record: Mapping[str, Mapping[str, float]], stage: str, shares: bool) -> str:
    if stage in record:
        return f"{record[stage]['seconds']:,.0f} s"
    return "shared" if shares and stage in ("prepare", "ids", "shards") else _UNKNOWN


def _short(commit: str) -> str:
    """Twelve digits, and whether files were changed."""
    digits, _, dirty = commit.partition("-")
    return digits[:12] + (f"-{dirty}" if dirty else "")


def _seen(one: Kept) -> str:
    return "; ".join(
        f"{variant_title(variant)}: {_count(counts['steps'])}, {_count(counts['samples'])}"
        for variant, counts in one.training.items()
    )


def _count(number: int | None) -> str:
    return _UNKNOWN if number is None else f"{number:,}"


def _each(texts: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(texts)) or _UNKNOWN


def _cell(found: Interval, signed: bool = False) -> str:
    low, high = figure(found.low, signed), figure(found.high, signed)
    return f"{figure(found.mean, signed)} ({low} to {high})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "No run is finished.\n"
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
