"""Turn the finished runs of a sweep into one compact file of figures, `results/SWEEP.json`.

The file holds no user and no item: only means with their intervals, paired differences, figures by stratum, how often
which ranking hits (`results_summary.py`), and where each run was made. The pages are made from it alone.
"""

import hashlib
import json
from collections.abc import Container, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from results_summary import Finished, Summary, of_seed, settings_of, summarise

from rarec.cluster import Sweep, SweepRun, first_to_do
from rarec.errors import UserError
from rarec.report.run_files import TrainingRecord, read_run
from rarec.stages.report import directories
from rarec.stages.run import Run
from rarec.stages.run_folder import read_record
from rarec.storage.files import atomic_write, read_json, write_text


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
    keep = {run.name for run in here if run.name in keep_ranks or ranks_file(sweep, run.name, place).exists()}
    with TemporaryDirectory() as scratch:
        finished = list(_read_all(sweep, here, keep, before, place, Path(scratch)))
        made = summarise(sweep, finished)
        notes = merge(made, before, sweep)
        for name in keep:
            if made["runs"][name] is not before["runs"].get(name):  # else some of its seeds are not here
                write_ranks([one for one in finished if one.run.name == name], ranks_file(sweep, name, place))
    made["missing"] = {
        label: stage for label, stage in left.items() if stage and not _has(made, label.rpartition("/seed-"))
    }
    write_text(file, dumped(made))
    return notes


def _read_all(
    sweep: Sweep, here: Sequence[SweepRun], keep: Container[str], before: Summary, place: Path, scratch: Path
) -> Iterator[Finished]:
    """Yield what is finished here, and the other seeds of runs whose ranks are kept, in the sweep's order."""
    for at, run in enumerate(sweep.runs):
        kept, ranks = ranks_file(sweep, run.name, place), scratch / f"{at}.parquet"
        if run in here:
            yield read_finished(run, sweep, ranks)
        elif run.name in keep and _has_kept(run, before, kept):
            yield read_kept(run, before["runs"][run.name], kept, ranks)


def ranks_file(sweep: Sweep, name: str, place: Path) -> Path:
    """Return the file of a run's ranks."""
    return place / f"{sweep.path.stem}.{name}.parquet"


def read_finished(run: SweepRun, sweep: Sweep, ranks: Path) -> Finished:
    """Read what the pages need of a finished run; write its ranks to `ranks`, with digests in place of ids.

    Raises:
        UserError: a file of the evaluation is missing or altered.
    """
    opened = Run(run.config)
    evaluation = opened.stage("evaluate")
    evaluation.check_files()
    trained = read_run(directories(opened), say=lambda line: None).training
    _write_digested(evaluation.directory / "ranks.parquet", ranks)
    strata, record = read_json(evaluation.directory / "strata.json"), read_record(opened.record_file)
    training = {variant: _seen(training) for variant, training in trained.items()}
    return Finished(run, ranks, of_seed(run, ranks, strata, record, training, sweep.stages))


def read_kept(run: SweepRun, before: Summary, file: Path, ranks: Path) -> Finished:
    """Read the same of a seed that was collected before, from the run's entry in `SWEEP.json` and its ranks."""
    wide = pq.read_table(file)
    names = [name for name in wide.column_names if name.endswith(f"@{run.seed}")]
    long = [
        pa.table(
            {
                "variant": pa.array([name.rpartition("@")[0]] * len(wide)),
                "user": wide["user"],
                "target": wide["target"],
                "rank": wide[name].cast(pa.int64()),
            }
        )
        for name in names
    ]
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


def _seen(training: TrainingRecord) -> tuple[int, int | None]:
    counted = all("samples" in line for line in training.losses)
    samples = sum(line["samples"] for line in training.losses) if counted else None
    return training.done.get("step", 0), samples


def _has(made: Summary, label: tuple[str, str, str]) -> bool:
    """Return whether a run with this name and seed is in the file."""
    name, _, seed = label
    return name in made["runs"] and int(seed) in made["runs"][name]["seeds"]


def merge(made: Summary, before: Summary, sweep: Sweep) -> list[str]:
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
    names = [name for name in planned if name in made["runs"]]
    made["runs"] = {name: made["runs"][name] for name in names}
    made["across"] = {
        f"{one} - {other}": _pair_of(f"{one} - {other}", len({one, other} & kept), made, before)
        for one, other in combinations(names, 2)
    }
    return notes


def _pair_of(pair: str, kept: int, made: Summary, before: Summary) -> Summary:
    """Return the differences between two runs, of which `kept` are as they were in the earlier file."""
    source = {0: made, 2: before}.get(kept, {"across": {}})["across"]
    return dict(source.get(pair, {"not_compared": "the runs were collected one without the other"}))


def write_ranks(finished: Sequence[Finished], file: Path) -> None:
    """Write the ranks of all seeds of a run, one row a user and one column `VARIANT@SEED`.

    Raises:
        UserError: the seeds did not rank the same users.
    """
    columns: dict[str, pa.Array] = {}
    for one in finished:
        table = pq.read_table(one.ranks)
        for variant in dict.fromkeys(table["variant"].to_pylist()):
            rows = table.filter(pc.equal(table["variant"], variant)).sort_by("user")
            known = columns.setdefault("user", rows["user"])
            if not rows["user"].equals(known):
                raise UserError(
                    f"{one.run.label}: its users are not those of the first seed", "leave evaluate.users out"
                )
            columns.setdefault("target", rows["target"])
            ranks = rows["rank"].to_numpy()
            columns[f"{variant}@{one.run.seed}"] = pa.array(ranks.astype(np.min_scalar_type(int(ranks.max()))))
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        pq.write_table(
            pa.table(columns),
            temporary,
            compression="zstd",
            compression_level=19,
            use_dictionary=False,
            use_byte_stream_split=[name for name in columns if name != "target"],
        )


def _digests(ids: Sequence[object], size: int) -> list[int]:
    known = {one: hashlib.blake2b(str(one).encode(), digest_size=size).digest() for one in set(ids)}
    return [int.from_bytes(known[one], "little") for one in ids]


def dumped(value: Any, depth: int = 0) -> str:
    """Return JSON with one line for each row of figures, so that a change of the file can be read."""
    flat = not isinstance(value, dict) or not any(isinstance(each, dict | list) for each in value.values())
    if flat:
        return json.dumps(value, ensure_ascii=False) + ("" if depth else "\n")
    indent = "\n" + " " * (depth + 1)
    rows = ",".join(f"{indent}{json.dumps(key)}: {dumped(each, depth + 1)}" for key, each in value.items())
    return "{" + rows + "\n" + " " * depth + "}" + ("" if depth else "\n")
