"""Compute what the file of a sweep holds: figures and paired differences with their intervals, strata, who hits.

Every run has the differences of all pairs of its variants. Two runs have those of each variant that both have, and,
where one of them lacks a variant of the other, of all pairs of the same kind (alone, with ID scores, with popularity).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from results_seeds import SeedMeans

from rarec.cluster import Sweep, SweepRun
from rarec.errors import UserError
from rarec.evaluation.labels import FUSED, HEADLINE, ID_ONLY, SANITY_GROUP, variant_group, variant_order
from rarec.ranking.intervals import Floats, mean_intervals
from rarec.stages import STAGES

HITS = "hr@100"
"""The metric of the tables by stratum and by who hits."""
DECIMALS = 9
COLUMNS = 1024
"""Values that are resampled together; bounds memory."""

Summary = dict[str, Any]
Triples = list[float]
"""Mean, low and high of each metric of `HEADLINE`, one after the other."""


@dataclass(frozen=True)
class Finished:
    """One run of a sweep with one seed, read back from its directory.

    Attributes:
        run: its name, seed and configuration.
        ranks: the file that `SeedMeans` reads.
        alone: what `SWEEP.json` says of this seed alone; see `of_seed`.
    """

    run: SweepRun
    ranks: Path
    alone: Mapping[str, Any]


def of_seed(
    run: SweepRun,
    ranks: Path,
    strata: Iterable[Mapping[str, Any]],
    record: Mapping[str, Mapping[str, Any]],
    training: Mapping[str, tuple[int, int | None]],
    stages: Iterable[str],
) -> Summary:
    """Return what `SWEEP.json` says of one seed alone.

    Args:
        run: its name, seed and configuration.
        ranks: the file that `SeedMeans` reads.
        strata: rows of strata.json.
        record: each stage's time, machine and commit, as in record.json.
        training: steps and samples seen by each trained variant; None where samples were not counted.
        stages: of the sweep.
    """
    return {"strata": _strata(strata), "hits": _hits(ranks), "made": _made(run, record, training, stages)}


def summarise(sweep: Sweep, finished: Iterable[Finished]) -> Summary:
    """Compute everything that the file of a sweep holds, runs in the sweep's order."""
    by_name: dict[str, dict[int, Finished]] = {}
    for one in finished:
        by_name.setdefault(one.run.name, {})[one.run.seed] = one
    planned = {name: sum(run.name == name for run in sweep.runs) for name in by_name}
    runs = {name: Run(seeds) for name, seeds in by_name.items()}
    return {
        "sweep": str(sweep.path),
        "metrics": list(HEADLINE),
        "runs": {name: _of_run(run, planned[name]) for name, run in runs.items()},
        "across": {f"{one} - {other}": _across(runs[one], runs[other]) for one, other in combinations(by_name, 2)},
        "missing": {},
    }


class Run:
    """The finished seeds of one run, and the means over them.

    Attributes:
        seeds: by seed.
        first: one of them, whose configuration stands for all.
        means: each user's metrics, averaged over the seeds.
    """

    def __init__(self, seeds: Mapping[int, Finished]) -> None:
        self.seeds = seeds
        self.first = next(iter(seeds.values()))
        self.means = self.over(list(seeds))

    def over(self, seeds: Sequence[int]) -> SeedMeans:
        """Average over some of the seeds."""
        resamples = self.first.run.config.evaluate.resamples
        return SeedMeans.read([self.seeds[seed].ranks for seed in seeds], resamples, self.first.run.seed)

    def shared(self, seeds: Sequence[int]) -> SeedMeans:
        """Average over the seeds that another run has as well."""
        return self.means if len(seeds) == len(self.seeds) else self.over(seeds)


def _of_run(run: Run, planned: int) -> Summary:
    means, first = run.means, run.first.run
    names = sorted(means.values, key=variant_order)
    pairs = {
        f"{one} - {other}": {metric: means.values[one][metric] - means.values[other][metric] for metric in HEADLINE}
        for one, other in combinations(names, 2)
    }
    alone = {name: {metric: means.values[name][metric] for metric in HEADLINE} for name in names}
    return {
        "main": first.config.main_variant.name,
        "entry": first.entry,
        "grid": dict(first.grid),
        "settings": settings_of(first),
        "seeds": list(run.seeds),
        "planned": planned,
        "users": means.n,
        "left_out": means.left_out,
        "figures": _intervals(alone, means),
        "differences": _intervals(pairs, means),
        **{
            part: {str(seed): one.alone[part] for seed, one in run.seeds.items()} for part in ("strata", "hits", "made")
        },
    }


def _intervals(values: Mapping[str, Mapping[str, Floats]], means: SeedMeans) -> dict[str, Triples]:
    """Intervals of many rows at once, all over the same users and on the same resamples."""
    flat = [(name, metric) for name in values for metric in values[name]]
    found: dict[str, Triples] = {name: [] for name in values}
    for start in range(0, len(flat), COLUMNS):
        some = {f"{name} {metric}": values[name][metric] for name, metric in flat[start : start + COLUMNS]}
        intervals = mean_intervals(some, means.resamples, means.seed)
        for name, metric in flat[start : start + COLUMNS]:
            found[name] += _rounded(intervals[f"{name} {metric}"])
    return found


def _rounded(values: Iterable[float]) -> Triples:
    return [round(value, DECIMALS) + 0.0 for value in values]


def _across(run: Run, other: Run) -> Summary:
    """Compare variants of two runs over the users and the seeds that both have, or say why not."""
    seeds = [seed for seed in run.seeds if seed in other.seeds]
    if not seeds:
        return {"not_compared": "no seed in common"}
    one, another = run.shared(seeds), other.shared(seeds)
    try:
        pairs = {
            f"{own} - {its}": one.against(another, own, its)
            for own, its in _pairs_across(list(one.values), list(another.values))
        }
    except UserError as error:
        return {"not_compared": error.problem}
    if not pairs:
        return {"not_compared": "no variants of the same kind"}
    common = next(iter(pairs.values()))
    values = {
        pair: {metric: both.values["one"][metric] - both.values["other"][metric] for metric in HEADLINE}
        for pair, both in pairs.items()
    }
    return {"users": common.n, "seeds": len(seeds), "differences": _intervals(values, common)}


def _pairs_across(own: Sequence[str], others: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of variants of two runs that are compared."""
    for one in sorted(own, key=variant_order):
        for other in sorted(others, key=variant_order):
            kind = variant_group(one)
            same_kind = kind == variant_group(other) != SANITY_GROUP
            if same_kind and (one == other or one not in others or other not in own):
                yield one, other


def _strata(rows: Iterable[Mapping[str, Any]]) -> Summary:
    """Return {stratum: {"users": n, variant: [mean, low, high]}} of `HITS`, without sanity checks."""
    found: dict[str, Summary] = {}
    for row in rows:
        if row["metric"] == HITS and variant_group(row["variant"]) != SANITY_GROUP:
            cell = found.setdefault(f"{row['stratum']} {row['bucket']}", {"users": row["n"]})
            cell[row["variant"]] = _rounded(row[name] for name in ("value", "low", "high"))
    return found


def _hits(ranks: Path) -> dict[str, list[float]]:
    """Return, for each variant with a fusion, the shares of users that the ID model or the variant hits.

    Ten numbers: hit by either, both, the ID model alone, the variant alone and neither; each followed by the share
    that the fusion hits as well.
    """
    hits = {variant: values[HITS] > 0 for variant, values in SeedMeans.read([ranks]).values.items()}
    rows = {}
    for variant in sorted((name for name in hits if name + FUSED in hits and ID_ONLY in hits), key=variant_order):
        ids, own, fused = hits[ID_ONLY], hits[variant], hits[variant + FUSED]
        parts = (ids | own, ids & own, ids & ~own, own & ~ids, ~(ids | own))
        rows[variant] = _rounded(float(share.mean()) for part in parts for share in (part, fused & part))
    return rows


def _made(
    run: SweepRun,
    record: Mapping[str, Mapping[str, Any]],
    training: Mapping[str, tuple[int, int | None]],
    stages: Iterable[str],
) -> Summary:
    """Return the commits and machines of one run, and the seconds of each stage; a shared stage has none of its own."""
    shares = bool(run.config.run.shared)
    parts = [part for stage in record.values() for part in (*stage.get("earlier", []), stage)]
    machines = [part["hardware"] + (f" x {part['ranks']}" if part["ranks"] > 1 else "") for part in parts]
    seconds = {stage: _seconds(record, stage, shares) for stage in stages if stage != "report"}
    return {
        "commits": list(dict.fromkeys(_short(part["commit"]) if part["commit"] else part["version"] for part in parts)),
        "hardware": list(dict.fromkeys(machines)),
        "seconds": seconds,
        "trained": {variant: list(counts) for variant, counts in training.items()},
    }


def _seconds(record: Mapping[str, Mapping[str, Any]], stage: str, shares: bool) -> int | str:
    if stage in record:
        return round(float(record[stage]["seconds"]))
    return "shared" if shares and STAGES[stage].shareable else "not recorded"


def _short(commit: str) -> str:
    """Return the first twelve digits, and whether files were changed."""
    digits, _, dirty = commit.partition("-")
    return digits[:12] + (f"-{dirty}" if dirty else "")


def settings_of(run: SweepRun) -> dict[str, Any]:
    """Return the fields in which a run differs from the base of its sweep, as JSON has them.

    Where a run is, and what is exported of it, changes no figure.
    """
    fields = {field: value for field, value in run.overrides.items() if not field.startswith(("run.", "export."))}
    return dict(json.loads(json.dumps(fields)))
