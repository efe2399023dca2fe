"""How far a run is, from its manifests alone: a look of milliseconds that loads no model and hashes no file.

The stages themselves look closer when they are run: at the contents of logs, of imported vectors and of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rarec.artefacts import MANIFEST, is_current, read_manifest
from rarec.config import VARIANTS, RunConfig
from rarec.config.identity import (
    baseline_of,
    bundle_settings,
    evaluate_settings,
    llm_settings,
    prepare_settings,
    shard_settings,
    source_settings,
    sources_of,
    variant_settings,
    vectors_of,
)
from rarec.config.load import read_tree
from rarec.errors import UserError
from rarec.paths import RunPaths
from rarec.sweep.definition import SweepRun
from rarec.training.finished import training_hash

State = Literal["done", "begun", "to do"]


def state_of(run: SweepRun, stages: Sequence[str]) -> tuple[State, str]:
    """Whether a run is done, and the stage that it is at: the last of these, or the first that is not done."""
    stage = first_to_do(run.config, stages)
    if stage is None:
        return "done", stages[-1]
    return ("begun" if RunPaths.of(run.config).config.exists() else "to do"), stage


def first_to_do(config: RunConfig, stages: Sequence[str]) -> str | None:
    """The first of these stages whose artefacts are not there, made as the configuration says; None if all are."""
    return next((stage for stage in stages if not _is_done(config, stage)), None)


def _is_done(config: RunConfig, stage: str) -> bool:
    try:
        return _CHECKS[stage](config, RunPaths.of(config))
    except (UserError, OSError):  # missing, torn, or made otherwise: the stage itself says which
        return False


def _prepare(config: RunConfig, paths: RunPaths) -> bool:
    return is_current(paths.prepare, "prepare", prepare_settings(config.prepare, config.run.seed), {})


def _ids(config: RunConfig, paths: RunPaths) -> bool:
    made_from = {"prepare": _hash(paths.prepare, "prepare")}
    return all(
        is_current(paths.source(name), "ids", source_settings(section, config.run.seed), made_from)
        for name, section in vectors_of(config).items()
    )


def _shards(config: RunConfig, paths: RunPaths) -> bool:
    made_from = {f"ids/{name}": _hash(paths.source(name), "ids") for name in sources_of(config)}
    made_from["prepare"] = _hash(paths.prepare, "prepare")
    return is_current(paths.shards, "shards", shard_settings(config), made_from)


def _train(config: RunConfig, paths: RunPaths) -> bool:
    """The model is compared by its name, as the run's own resolved configuration has it."""
    recorded = read_tree(paths.config).get("llm")
    wanted = llm_settings(config)
    if not isinstance(recorded, Mapping) or any(recorded.get(name) != value for name, value in wanted.items()):
        return False
    made_from = {"shards": _hash(paths.shards, "shards")}
    for name in config.train.variants:
        directory = paths.train(name)
        if not is_current(directory, "train", variant_settings(config, VARIANTS[name]), made_from):
            return False
        training_hash(directory)
    return True


def _evaluate(config: RunConfig, paths: RunPaths) -> bool:
    made_from: dict[str, str] = {name: training_hash(paths.train(name)) for name in config.train.variants}
    made_from["prepare"] = _hash(paths.prepare, "prepare")
    made_from["baseline"] = _hash(paths.source(baseline_of(config)[0]), "ids")
    return is_current(paths.evaluation, "evaluate", evaluate_settings(config), made_from)


def _export(config: RunConfig, paths: RunPaths) -> bool:
    made_from = {"evaluate": _hash(paths.evaluation, "evaluate")}
    return is_current(paths.bundle, "bundle", bundle_settings(config), made_from)


def _report(config: RunConfig, paths: RunPaths) -> bool:
    page = paths.report / "report.html"
    return page.stat().st_mtime >= (paths.evaluation / MANIFEST).stat().st_mtime


def _hash(directory: Path, kind: str) -> str:
    return str(read_manifest(directory, kind)["hash"])


_CHECKS: dict[str, Callable[[RunConfig, RunPaths], bool]] = {
    "prepare": _prepare,
    "ids": _ids,
    "shards": _shards,
    "train": _train,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
}
