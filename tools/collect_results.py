"""Turn the finished runs of a sweep into one compact file of figures, `results/SWEEP.json`.

The file holds no user and no item: only means with their intervals, paired differences, figures by stratum, how often
which ranking hits, and where each run was made. The pages are made from it alone (`make_results.py`).
`results_statistics.py` computes the figures.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.cluster.definition import Sweep, SweepRun, first_to_do
from rarec.data.tables import read_columns
from rarec.errors import UserError
from rarec.evaluation.results import HEADLINE
from rarec.report.run_files import TrainingRecord, read_run
from rarec.stages import STAGES
from rarec.stages.results import directories
from rarec.stages.run import Run
from rarec.storage.files import atomic_write, read_json, write_text
from tools.results_statistics import Ranks, SeedMeans, Summary, compare, hits, run_figures, strata

PARTS = ("strata", "hits", "made")
"""What `SWEEP.json` says of each seed alone."""


@dataclass(frozen=True)
class Finished:
    """One run of a sweep with one seed.

    Attributes:
        run: its name, seed and configuration.
        ranks: with digests in place of ids.
        alone: its `PARTS`.
    """

    run: SweepRun
    ranks: Ranks
    alone: Mapping[str, Any]


Seeds = Mapping[int, Finished]


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
    next_stages = {run.label: first_to_do(run.config, sweep.stages) for run in sweep.runs}
    here = [run for run in sweep.runs if next_stages[run.label] is None]
    if not here:
        raise UserError(f"{sweep.path}: none of its runs is finished", f"run: rarec sweep {sweep.path}")
    unknown = set(keep_ranks) - {run.name for run in here}
    if unknown:
        raise UserError(f"--ranks: no finished run is called {min(unknown)}", "name one of the sweep's finished runs")
    file = place / f"{sweep.path.stem}.json"
    before = read_json(file) if file.exists() else {"runs": {}}
    files = {run.name: place / f"{sweep.path.stem}.{run.name}.parquet" for run in here}
    files = {name: path for name, path in files.items() if name in keep_ranks or path.exists()}
    runs: dict[str, dict[int, Finished]] = {}
    for finished in _read_all(sweep, here, files, before["runs"]):
        runs.setdefault(finished.run.name, {})[finished.run.seed] = finished
    made = summarise(sweep, runs)
    notes = _merge(made, before, sweep)
    for name, path in files.items():
        if made["runs"][name] is not before["runs"].get(name):  # else some of its seeds are not here
            _write_ranks(runs[name], path)
    collected = {f"{name}/seed-{seed}" for name, run in made["runs"].items() for seed in run["seeds"]}
    made["missing"] = {label: stage for label, stage in next_stages.items() if stage and label not in collected}
    write_text(file, _dumped(made))
    return notes


def _read_all(sweep: Sweep, here: Sequence[SweepRun], files: Mapping[str, Path], before: Summary) -> Iterator[Finished]:
    """Yield what is finished here, and the other seeds of runs whose ranks are kept, in the sweep's order."""
    for run in sweep.runs:
        if run in here:
            yield _read_finished(run, sweep)
        elif run.name in files and run.name in before and files[run.name].exists():
            known, ranks = before[run.name], _read_kept(files[run.name], run.seed)
            if run.seed in known["seeds"] and known["settings"] == settings_of(run) and len(ranks.columns) > 1:
                yield Finished(run, ranks, {part: known[part][str(run.seed)] for part in PARTS})


def _read_finished(run: SweepRun, sweep: Sweep) -> Finished:
    """Read what the pages need of a finished run.

    Raises:
        UserError: a file of the evaluation is missing or altered.
    """
    opened = Run(run.config)
    evaluation = opened.stage("evaluate").checked()
    files = read_run(directories(opened), say=lambda line: None)
    ranks = read_ranks(evaluation / "ranks.parquet")
    made = _made(run, opened.read_record(), files.training, sweep.stages)
    return Finished(run, ranks, {"strata": strata(files.strata), "hits": hits(ranks), "made": made})


def read_ranks(file: Path) -> Ranks:
    """Read ranks with a digest of 8 bytes for each user, and of one byte for each target.

    A byte is enough to see that two splits differ. (Who knows a user's id can find that user's row.) The last
    `PLACE_BITS` of a user's digest tell the user's questions apart.
    """
    long = read_columns(file, ["variant", "user", "place", "target", "rank"]).to_pandas()
    variants = long["variant"].unique()
    asked = long[long["variant"] == variants[0]]  # all have the same questions in the same order
    ranks = {name: own["rank"].to_numpy() for name, own in long.groupby("variant", sort=False)}
    digests = _digests(asked["user"], 8) ^ (asked["place"].to_numpy(np.uint64) - np.uint64(1))
    targets = {"target": _digests(asked["target"], 1)}
    return pd.DataFrame(targets | {name: ranks[name] for name in variants}, pd.Index(digests, name="user"))


def _digests(ids: Iterable[object], size: int) -> np.ndarray:
    digests = (hashlib.blake2b(str(value).encode(), digest_size=size).digest() for value in ids)
    return np.array([int.from_bytes(digest, "little") for digest in digests], f"u{size}")


def _read_kept(file: Path, seed: int) -> Ranks:
    """Read the ranks of a seed that were kept before."""
    kept = pq.read_table(file).to_pandas().set_index("user")
    of_seed = {name: name.rpartition("@")[0] for name in kept if name.endswith(f"@{seed}")}
    return kept[["target", *of_seed]].rename(columns=of_seed)


def _write_ranks(seeds: Seeds, file: Path) -> None:
    """Write the ranks of all seeds of a run, one row a user and one column `VARIANT@SEED`.

    Raises:
        UserError: the seeds did not rank the same users.
    """
    columns: dict[str, np.ndarray] = {}
    for seed, finished in seeds.items():
        ranks = finished.ranks.sort_index()
        if not np.array_equal(ranks.index, columns.setdefault("user", ranks.index.to_numpy())):
            problem = f"{finished.run.label}: its users are not those of the first seed"
            raise UserError(problem, "leave evaluate.users out")
        columns.setdefault("target", ranks.pop("target").to_numpy())
        for variant, own in ranks.items():
            columns[f"{variant}@{seed}"] = own.to_numpy(np.min_scalar_type(own.max()))
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
    pairs = {f"{run} - {other}": len({run, other} & kept) for run, other in combinations(made["runs"], 2)}
    sources = {0: made["across"], 2: before.get("across", {})}  # by how many of the two are as they were
    apart = {"not_compared": "the runs were collected one without the other"}
    made["across"] = {pair: sources.get(count, {}).get(pair, apart) for pair, count in pairs.items()}
    return notes


def summarise(sweep: Sweep, runs: Mapping[str, Seeds]) -> Summary:
    """Compute everything that the file of a sweep holds, runs in the sweep's order."""

    @cache
    def means(name: str, numbers: tuple[int, ...]) -> SeedMeans:
        seeds = [runs[name][number] for number in numbers]
        return SeedMeans.of({seed.run.label: seed.ranks for seed in seeds})

    def across(name: str, other: str) -> Summary:
        both = tuple(seed for seed in runs[name] if seed in runs[other])
        if not both:
            return {"not_compared": "no seed in common"}
        compared = compare(means(name, both), means(other, both), next(iter(runs[name].values())).run)
        return compared if "not_compared" in compared else {"users": 0, "seeds": len(both), **compared}

    planned = {name: sum(run.name == name for run in sweep.runs) for name in runs}
    return {
        "sweep": str(sweep.path),
        "metrics": list(HEADLINE),
        "runs": {name: _of_run(seeds, planned[name], means(name, tuple(seeds))) for name, seeds in runs.items()},
        "across": {f"{name} - {other}": across(name, other) for name, other in combinations(runs, 2)},
        "missing": {},
    }


def _of_run(seeds: Seeds, planned: int, means: SeedMeans) -> Summary:
    run = next(iter(seeds.values())).run  # all seeds have the same configuration
    return {
        "main": run.config.main_variant.name,
        "entry": run.entry,
        "grid": dict(run.grid),
        "settings": settings_of(run),
        "seeds": list(seeds),
        "planned": planned,
        "users": len(means.users),
        "left_out": means.left_out,
        **run_figures(means, run),
        **{part: {str(number): seed.alone[part] for number, seed in seeds.items()} for part in PARTS},
    }


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
