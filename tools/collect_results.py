"""Turn the finished runs of a sweep into one compact file of figures, `results/SWEEP.json`.

The file holds no user and no item: only means with their intervals, paired differences, figures by stratum, how often
which ranking hits, and where each run was made. The pages are made from it alone (`make_results.py`).

Every run has the differences of all pairs of its variants. Two runs have those of each variant that both have, and,
where one of them lacks a variant of the other, of all pairs of the same kind (alone, with ID scores, with popularity).

A figure of several seeds is the mean over users of each user's mean over the seeds. The bootstrap resamples users, so
an interval covers the choice of users and not the choice of seeds.

Shape letters: U users.
"""

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rarec.cluster import Sweep, SweepRun, first_to_do
from rarec.data.tables import read_columns
from rarec.errors import UserError
from rarec.evaluation.labels import FUSED, HEADLINE, ID_ONLY, SANITY_GROUP, variant_group, variant_order
from rarec.ranking.metrics import Floats, mean_intervals, metric_values
from rarec.report.run_files import TrainingRecord, read_run
from rarec.stages import STAGES
from rarec.stages.report import directories
from rarec.stages.run import Run
from rarec.storage.files import atomic_write, read_json, write_text

HITS = "hr@100"
"""The metric of the tables by stratum and by who hits."""
CUTOFFS = (10, 100)
"""The cutoffs of the headline's metrics."""
DECIMALS = 9
COLUMNS = 1024
"""Values that are resampled together; bounds memory."""

Summary = dict[str, Any]
Values = Mapping[str, Mapping[str, Floats]]
"""variant -> metric -> (U,)"""
Triples = list[float]
"""Mean, low and high of each metric of `HEADLINE`, one after the other."""


@dataclass(frozen=True)
class SeedMeans:
    """The metrics of each user under each variant of a run, averaged over seeds.

    Attributes:
        values: for the same users in the same order.
        users: ids of the users, in that order.
        targets: the users' targets, in that order.
        left_out: number of users that only some of the seeds ranked.
    """

    values: Values
    users: Sequence[object]
    targets: Sequence[object]
    left_out: int

    @classmethod
    def read(cls, files: Sequence[Path]) -> "SeedMeans":
        """Average `evaluation/ranks.parquet` of each seed over the users and variants that all of them have.

        Raises:
            UserError: a user's target differs between seeds, or no user was ranked under all of them.
        """
        tables = [read_columns(file) for file in files]
        targets = [dict(zip(*_columns(table, "user", "target"), strict=True)) for table in tables]
        users = [user for user in targets[0] if all(user in own for own in targets)]
        for file, own in zip(files, targets, strict=True):
            other = next((user for user in users if own[user] != targets[0][user]), None)
            if other is not None:
                problem = f"{file}: user {other!r} has another target than in {files[0]}"
                raise UserError(problem, "seeds of one run must be evaluated on the same split")
        if not users:
            raise UserError(f"no user was ranked in all of {', '.join(map(str, files))}", "leave evaluate.users out")
        seeds = [_user_metrics(table, users) for table in tables]
        values = {
            variant: {metric: np.mean([seed[variant][metric] for seed in seeds], axis=0) for metric in metrics}
            for variant, metrics in seeds[0].items()
            if all(variant in seed for seed in seeds)
        }
        return cls(values, users, [targets[0][user] for user in users], len(set().union(*targets)) - len(users))


def _columns(table: pa.Table, *names: str) -> list[list[object]]:
    return [table[name].to_pylist() for name in names]


def _user_metrics(table: pa.Table, users: Sequence[object]) -> dict[str, dict[str, Floats]]:
    """Return each metric of each variant for these users, in this order."""
    metrics = {}
    for variant in pc.unique(table["variant"]).to_pylist():
        ranks = dict(zip(*_columns(table.filter(pc.equal(table["variant"], variant)), "user", "rank"), strict=True))
        metrics[str(variant)] = metric_values(np.array([ranks[user] for user in users], np.int64), CUTOFFS)
    return metrics


@dataclass(frozen=True)
class Finished:
    """One run of a sweep with one seed, read back from its directory.

    Attributes:
        run: its name, seed and configuration.
        ranks: the file that `SeedMeans` reads.
        alone: what `SWEEP.json` says of this seed alone: `strata`, `hits` and `made`.
    """

    run: SweepRun
    ranks: Path
    alone: Mapping[str, Any]


Seeds = Mapping[int, Finished]
Means = Callable[[tuple[Path, ...]], SeedMeans]


def collect(sweep: Sweep, place: Path, keep_ranks: Sequence[str] = ()) -> list[str]:
    """Write `SWEEP.json` from the runs that are finished on this machine.

    A run that is not finished here keeps what the file already has of it, as long as its settings in the sweep are the
    same. Of a run whose ranks are kept, the seeds that are finished here join those that the files have already: they
    may come from different machines.

    Args:
        sweep: with its runs' configurations.
        place: the directory of all sweeps' files.
        keep_ranks: names of runs whose ranks are kept as well, in `SWEEP.RUN.parquet`, from now on.

    Returns:
        One line for each entry of the file that was dropped, or that is not replaced.

    Raises:
        UserError: the sweep does not evaluate, nothing is finished, or a file of a run is missing or altered.
    """
    if "evaluate" not in sweep.stages:
        raise UserError(f"{sweep.path}: `stages` lacks evaluate: there are no figures", "add it, and run the sweep")
    left = {run.label: first_to_do(run.config, sweep.stages) for run in sweep.runs}
    here = [run for run in sweep.runs if left[run.label] is None]
    if not here:
        raise UserError(f"{sweep.path}: none of its runs is finished", f"run: rarec sweep {sweep.path}")
    unknown = set(keep_ranks) - {run.name for run in here}
    if unknown:
        raise UserError(f"--ranks: no finished run is called {min(unknown)}", "name one of the sweep's finished runs")
    file = place / f"{sweep.path.stem}.json"
    before = read_json(file) if file.exists() else {"runs": {}}
    keep = {run.name for run in here if run.name in keep_ranks or _ranks_file(sweep, run.name, place).exists()}
    with TemporaryDirectory() as temporary:
        finished = list(_read_all(sweep, here, keep, before, place, Path(temporary)))
        made = summarise(sweep, finished)
        notes = _merge(made, before, sweep)
        for name in keep:
            if made["runs"][name] is not before["runs"].get(name):  # else some of its seeds are not here
                _write_ranks([seed for seed in finished if seed.run.name == name], _ranks_file(sweep, name, place))
    collected = {f"{name}/seed-{seed}" for name, run in made["runs"].items() for seed in run["seeds"]}
    made["missing"] = {label: stage for label, stage in left.items() if stage and label not in collected}
    write_text(file, _dumped(made))
    return notes


def _read_all(
    sweep: Sweep, here: Sequence[SweepRun], keep: Container[str], before: Summary, place: Path, temporary: Path
) -> Iterator[Finished]:
    """Yield what is finished here, and the other seeds of runs whose ranks are kept, in the sweep's order."""
    for number, run in enumerate(sweep.runs):
        kept, ranks = _ranks_file(sweep, run.name, place), temporary / f"{number}.parquet"
        if run in here:
            yield _read_finished(run, sweep, ranks)
        elif run.name in keep and _has_kept(run, before, kept):
            yield _read_kept(run, before["runs"][run.name], kept, ranks)


def _ranks_file(sweep: Sweep, name: str, place: Path) -> Path:
    return place / f"{sweep.path.stem}.{name}.parquet"


def _read_finished(run: SweepRun, sweep: Sweep, ranks: Path) -> Finished:
    """Read what the pages need of a finished run; write its ranks to `ranks`, with digests in place of ids.

    Raises:
        UserError: a file of the evaluation is missing or altered.
    """
    opened = Run(run.config)
    evaluation = opened.stage("evaluate").checked()
    files = read_run(directories(opened), say=lambda line: None)
    _write_digested(evaluation / "ranks.parquet", ranks)
    made = _made(run, opened.read_record(), files.training, sweep.stages)
    return Finished(run, ranks, {"strata": _strata(files.strata), "hits": _hits(ranks), "made": made})


def _read_kept(run: SweepRun, before: Summary, file: Path, ranks: Path) -> Finished:
    """Read the same of a seed that was collected before, from the run's entry in `SWEEP.json` and its ranks."""
    wide = pq.read_table(file)
    long = []
    for name in wide.column_names:
        variant, _, seed = name.rpartition("@")
        if seed == str(run.seed):
            columns = {"variant": pa.array([variant] * len(wide)), "user": wide["user"], "target": wide["target"]}
            long.append(pa.table({**columns, "rank": wide[name].cast(pa.int64())}))
    pq.write_table(pa.concat_tables(long), ranks)
    return Finished(run, ranks, {part: before[part][str(run.seed)] for part in ("strata", "hits", "made")})


def _has_kept(run: SweepRun, before: Summary, file: Path) -> bool:
    """Return whether a seed was collected before with its ranks, and with the same settings."""
    known = before["runs"].get(run.name, {"seeds": [], "settings": None})
    collected = run.seed in known["seeds"] and known["settings"] == settings_of(run) and file.exists()
    return collected and any(name.endswith(f"@{run.seed}") for name in pq.read_schema(file).names)


def _write_digested(file: Path, to: Path) -> None:
    """Write ranks with a digest of 8 bytes for each user, and of one byte for each target.

    A byte is enough to see that two splits differ. (Who knows a user's id can find that user's row.)
    """
    table = pq.read_table(file, columns=["variant", "user", "target", "rank"])
    table = table.set_column(1, "user", pa.array(_digests(table["user"].to_pylist(), 8), pa.uint64()))
    table = table.set_column(2, "target", pa.array(_digests(table["target"].to_pylist(), 1), pa.uint8()))
    pq.write_table(table, to)


def _digests(ids: Sequence[object], size: int) -> list[int]:
    known = {value: hashlib.blake2b(str(value).encode(), digest_size=size).digest() for value in set(ids)}
    return [int.from_bytes(known[value], "little") for value in ids]


def _write_ranks(finished: Sequence[Finished], file: Path) -> None:
    """Write the ranks of all seeds of a run, one row a user and one column `VARIANT@SEED`.

    Raises:
        UserError: the seeds did not rank the same users.
    """
    columns: dict[str, pa.Array] = {}
    for seed in finished:
        table = pq.read_table(seed.ranks)
        for variant in dict.fromkeys(table["variant"].to_pylist()):
            rows = table.filter(pc.equal(table["variant"], variant)).sort_by("user")
            if not rows["user"].equals(columns.setdefault("user", rows["user"])):
                problem = f"{seed.run.label}: its users are not those of the first seed"
                raise UserError(problem, "leave evaluate.users out")
            columns.setdefault("target", rows["target"])
            ranks = rows["rank"].to_numpy()
            columns[f"{variant}@{seed.run.seed}"] = pa.array(ranks.astype(np.min_scalar_type(int(ranks.max()))))
    file.parent.mkdir(parents=True, exist_ok=True)
    split = [name for name in columns if name != "target"]
    compressed = {"compression": "zstd", "compression_level": 19, "use_dictionary": False}
    with atomic_write(file) as temporary:
        pq.write_table(pa.table(columns), temporary, **compressed, use_byte_stream_split=split)


def _merge(made: Summary, before: Summary, sweep: Sweep) -> list[str]:
    """Add to `made` what an earlier file has of runs that are not finished here, and put runs in the sweep's order.

    A run of which fewer seeds are finished here than the earlier file has stays as it is there.

    Returns:
        One line for each run of the earlier file that is dropped, or stays though a part of it is finished here.
    """
    planned = {run.name: settings_of(run) for run in sweep.runs}
    notes, kept = [], set()
    for name, run in before["runs"].items():
        seeds = len(made["runs"][name]["seeds"]) if name in made["runs"] else 0
        if name not in planned:
            notes.append(f"dropped {name}: the sweep has no such run")
        elif planned[name] != run["settings"]:
            notes.append(f"dropped {name} as it was before: its settings have changed")
        elif seeds < len(run["seeds"]):
            made["runs"][name] = run
            kept.add(name)
            notes += [f"kept {name} as it was: the file has more of its seeds than are finished here"] if seeds else []
    made["runs"] = {name: made["runs"][name] for name in planned if name in made["runs"]}
    pairs = {f"{one} - {other}": len({one, other} & kept) for one, other in combinations(made["runs"], 2)}
    sources = {0: made["across"], 2: before.get("across", {})}  # by how many of the two are as they were
    apart = {"not_compared": "the runs were collected one without the other"}
    made["across"] = {pair: sources.get(count, {}).get(pair, apart) for pair, count in pairs.items()}
    return notes


def summarise(sweep: Sweep, finished: Iterable[Finished]) -> Summary:
    """Compute everything that the file of a sweep holds, runs in the sweep's order."""
    runs: dict[str, dict[int, Finished]] = {}
    for seed in finished:
        runs.setdefault(seed.run.name, {})[seed.run.seed] = seed
    planned = {name: sum(run.name == name for run in sweep.runs) for name in runs}
    means: Means = cache(SeedMeans.read)
    pairs = combinations(runs, 2)
    return {
        "sweep": str(sweep.path),
        "metrics": list(HEADLINE),
        "runs": {name: _of_run(seeds, planned[name], means) for name, seeds in runs.items()},
        "across": {f"{one} - {other}": _across(runs[one], runs[other], means) for one, other in pairs},
        "missing": {},
    }


def _of_run(seeds: Seeds, planned: int, means: Means) -> Summary:
    first, own = _first(seeds), means(_rank_files(seeds, seeds))
    names = sorted(own.values, key=variant_order)
    pairs = {f"{one} - {other}": _minus(own.values[one], own.values[other]) for one, other in combinations(names, 2)}
    alone = {name: {metric: own.values[name][metric] for metric in HEADLINE} for name in names}
    return {
        "main": first.config.main_variant.name,
        "entry": first.entry,
        "grid": dict(first.grid),
        "settings": settings_of(first),
        "seeds": list(seeds),
        "planned": planned,
        "users": len(own.users),
        "left_out": own.left_out,
        "figures": _intervals(alone, first),
        "differences": _intervals(pairs, first),
        **{part: {str(seed): each.alone[part] for seed, each in seeds.items()} for part in ("strata", "hits", "made")},
    }


def _across(one: Seeds, other: Seeds, means: Means) -> Summary:
    """Compare variants of two runs over the users and the seeds that both have, or say why not."""
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return {"not_compared": "no seed in common"}
    own, its = means(_rank_files(one, seeds)), means(_rank_files(other, seeds))
    pairs = list(_pairs_across(list(own.values), list(its.values)))
    if not pairs:
        return {"not_compared": "no variants of the same kind"}
    its_row = {user: row for row, user in enumerate(its.users)}
    rows = np.array([(row, its_row[user]) for row, user in enumerate(own.users) if user in its_row], int).reshape(-1, 2)
    if not len(rows):
        return {"not_compared": "no test user in common"}
    if any(own.targets[row] != its.targets[its_row] for row, its_row in rows.tolist()):
        return {"not_compared": "other test targets"}
    differences = {f"{a} - {b}": _minus(own.values[a], its.values[b], *rows.T) for a, b in pairs}
    return {"users": len(rows), "seeds": len(seeds), "differences": _intervals(differences, _first(one))}


def _first(seeds: Seeds) -> SweepRun:
    """Return one of the seeds of a run, whose configuration is that of all."""
    return next(iter(seeds.values())).run


def _rank_files(run: Seeds, seeds: Iterable[int]) -> tuple[Path, ...]:
    return tuple(run[seed].ranks for seed in seeds)


def _minus(
    one: Mapping[str, Floats], other: Mapping[str, Floats], rows: Any = slice(None), other_rows: Any = slice(None)
) -> dict[str, Floats]:
    return {metric: one[metric][rows] - other[metric][other_rows] for metric in HEADLINE}


def _pairs_across(own: Sequence[str], others: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of variants of two runs that are compared."""
    for one in sorted(own, key=variant_order):
        for other in sorted(others, key=variant_order):
            kind = variant_group(one)
            same_kind = kind == variant_group(other) != SANITY_GROUP
            if same_kind and (one == other or one not in others or other not in own):
                yield one, other


def _intervals(values: Values, run: SweepRun) -> dict[str, Triples]:
    """Return the intervals of many rows at once, all over the same users and on the same resamples."""
    columns = {(name, metric): column for name, metrics in values.items() for metric, column in metrics.items()}
    keys = list(columns)
    triples: dict[str, Triples] = {name: [] for name in values}
    for start in range(0, len(keys), COLUMNS):
        some = {str(key): columns[key] for key in keys[start : start + COLUMNS]}
        intervals = mean_intervals(some, run.config.evaluate.resamples, run.seed)
        for key in keys[start : start + COLUMNS]:
            triples[key[0]] += _rounded(intervals[str(key)])
    return triples


def _rounded(values: Iterable[float]) -> Triples:
    return [round(value, DECIMALS) + 0.0 for value in values]


def _strata(rows: Iterable[Mapping[str, Any]]) -> Summary:
    """Return {stratum: {"users": n, variant: [mean, low, high]}} of `HITS`, without sanity checks."""
    strata: dict[str, Summary] = {}
    for row in rows:
        if row["metric"] == HITS and variant_group(row["variant"]) != SANITY_GROUP:
            cells = strata.setdefault(f"{row['stratum']} {row['bucket']}", {"users": row["n"]})
            cells[row["variant"]] = _rounded(row[name] for name in ("value", "low", "high"))
    return strata


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
    training: Mapping[str, TrainingRecord],
    stages: Iterable[str],
) -> Summary:
    """Return the commits and machines of one run, and the seconds of each stage; a shared stage has none of its own."""
    parts = [part for stage in record.values() for part in (*stage.get("earlier", []), stage)]
    machines = [part["hardware"] + (f" x {part['ranks']}" if part["ranks"] > 1 else "") for part in parts]
    commits = [_short(part["commit"]) if part["commit"] else part["version"] for part in parts]
    seconds: dict[str, int | str] = {}
    for stage in (stage for stage in stages if stage != "report"):
        shared = run.config.run.shared and STAGES[stage].shareable
        seconds[stage] = "shared" if shared else "not recorded"
        if stage in record:
            seconds[stage] = round(float(record[stage]["seconds"]))
    return {
        "commits": list(dict.fromkeys(commits)),
        "hardware": list(dict.fromkeys(machines)),
        "seconds": seconds,
        "trained": {variant: _trained(training) for variant, training in training.items()},
    }


def _trained(training: TrainingRecord) -> list[int | None]:
    """Return steps and samples seen by a trained variant; None where samples were not counted."""
    counted = all("samples" in line for line in training.losses)
    return [training.done.get("step", 0), sum(line["samples"] for line in training.losses) if counted else None]


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


def _dumped(value: Any, depth: int = 0) -> str:
    """Return JSON with one line for each row of figures, so that a change of the file can be read."""
    end = "" if depth else "\n"
    if not isinstance(value, dict) or not any(isinstance(each, dict | list) for each in value.values()):
        return json.dumps(value, ensure_ascii=False) + end
    indent = "\n" + " " * (depth + 1)
    rows = ",".join(f"{indent}{json.dumps(key)}: {_dumped(each, depth + 1)}" for key, each in value.items())
    return "{" + rows + "\n" + " " * depth + "}" + end
