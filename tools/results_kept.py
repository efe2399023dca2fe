"""What `make_results.py` keeps of a finished run, small and fit to be published: all that a page is made of.

Kept are the rank of each test user's target under each variant, with digests in place of the ids of users and targets, so
that runs can still be paired (who knows a user's id can find that user's ranks); the strata; what each stage took,
where and by which commit; and the configuration. A run that is configured otherwise by now does not find what was kept
of it; a field that came later counts as its default, and the commit tells.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rarec.config.identity import (
    engine_of_tables,
    evaluate_settings,
    imported_files,
    llm_settings,
    prepare_settings,
    shard_settings,
    source_settings,
    variant_settings,
    vectors_of,
)

from rarec.artefacts import MANIFEST, check_files, differences, read_manifest, write_manifest
from rarec.config import VARIANTS, RunConfig
from rarec.config.load import validated
from rarec.errors import UserError
from rarec.evaluation.run_files import TrainingRecord, read_run
from rarec.files import new_directory, read_json, write_json
from rarec.paths import RunPaths
from rarec.sweep import SweepRun

KIND = "results"
RANKS = "ranks.parquet"
ABOUT = "run.json"
REMEDY = "fetch it again, or delete the directory and make the page where the run is finished"


@dataclass(frozen=True)
class Kept:
    """What is kept of a finished run.

    Attributes:
        run: of the sweep.
        ranks: the file that `SeedMeans` reads.
        strata: rows of strata.json.
        record: of each stage, as in record.json.
        training: of each variant, its steps and the samples seen in them; None where they were not counted.
    """

    run: SweepRun
    ranks: Path
    strata: list[dict[str, Any]]
    record: dict[str, dict[str, Any]]
    training: dict[str, dict[str, int | None]]


def keep(run: SweepRun, place: Path) -> None:
    """Keep a finished run.

    Args:
        run: with all of its files.
        place: of everything that is kept of its sweep.

    Raises:
        UserError: a file of the evaluation is missing or altered.
    """
    paths = RunPaths.of(run.config)
    manifest = read_manifest(paths.evaluation, "evaluate")
    check_files(paths.evaluation, manifest)
    trained = read_run(paths, run.config.train.variants, say=lambda line: None).training
    with new_directory(place / run.label) as aside:
        pq.write_table(_digested(pq.read_table(paths.evaluation / RANKS)), aside / RANKS, compression="zstd")
        about = {
            "strata": read_json(paths.evaluation / "strata.json"),
            "record": read_json(paths.record) if paths.record.exists() else {},
            "training": {variant: _seen(training) for variant, training in trained.items()},
        }
        write_json(aside / ABOUT, about)
        write_manifest(
            aside, KIND, settings=run.config.model_dump(mode="json"), made_from={"evaluate": manifest["hash"]}
        )


def kept(run: SweepRun, place: Path) -> Kept | None:
    """What was kept of a run, if it was configured as it is now.

    Raises:
        UserError: a file of it is torn or altered.
    """
    directory = place / run.label
    if not directory.exists() or changed(run, place):
        return None
    check_files(directory, _manifest(directory), REMEDY)
    return Kept(run, directory / RANKS, **read_json(directory / ABOUT))


def changed(run: SweepRun, place: Path) -> list[str]:
    """The settings that are not as they were when the run was kept."""
    directory = place / run.label
    if not directory.exists():
        return []
    settings = _manifest(directory)["settings"]
    try:
        then = validated(RunConfig, settings, str(directory / MANIFEST))
    except UserError as error:
        return [error.problem]
    return differences(_settings(then), _settings(run.config))


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        return read_manifest(directory, KIND)
    except UserError as error:
        raise UserError(error.problem, REMEDY) from None


def _settings(config: RunConfig) -> dict[str, Any]:
    """All that shapes a run's figures; files are known by their names."""
    seed, vectors = config.run.seed, vectors_of(config)
    return {
        "prepare": prepare_settings(config.prepare, seed),
        "engine": engine_of_tables(config.prepare),
        "ids": {name: source_settings(section, seed) for name, section in vectors.items()},
        "imported": {name: imported_files(section) for name, section in vectors.items()},
        "llm": llm_settings(config),
        "shards": shard_settings(config),
        "variants": {name: variant_settings(config, VARIANTS[name]) for name in config.train.variants},
        "evaluate": evaluate_settings(config),
    }


def _seen(training: TrainingRecord) -> dict[str, int | None]:
    counted = all("samples" in line for line in training.losses)
    samples = sum(line["samples"] for line in training.losses) if counted else None
    return {"steps": training.done.get("step", 0), "samples": samples}


def _digested(table: pa.Table) -> pa.Table:
    """Users by 8 bytes, which tell any number of them apart; targets by one, enough to see that splits differ."""
    users = pa.array(_digests(table["user"].to_pylist(), 8), pa.uint64())
    targets = pa.array(_digests(table["target"].to_pylist(), 1), pa.uint8())
    ranks = table["rank"].cast(pa.int32())
    columns = {"variant": table["variant"], "user": users, "target": targets, "rank": ranks}
    return pa.table(columns)


def _digests(ids: Sequence[object], size: int) -> list[int]:
    known = {one: hashlib.blake2b(str(one).encode(), digest_size=size).digest() for one in set(ids)}
    return [int.from_bytes(known[one], "little") for one in ids]
