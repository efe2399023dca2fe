"""Read back the files of an evaluated run, for its report and the terminal."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rarec.config import RunConfig
from rarec.errors import UserError
from rarec.evaluation.labels import listed, variant_title
from rarec.evaluation.verdict import Results
from rarec.storage.artefacts import MANIFEST
from rarec.storage.files import read_json, read_lines, sha256_file

Row = dict[str, Any]
Say = Callable[[str], None]
_REMEDY = "evaluate again: rarec evaluate CONFIG --fresh"
_METRIC = "variant metric protocol value low high n"
ROWS = {
    "metrics": _METRIC,
    "validation": _METRIC,
    "comparisons": "variant baseline metric protocol difference low high n",
    "strata": "variant stratum bucket order metric value low high n",
    "examples": "user history target target_rank top",
}
"""Fields that the report reads, by file of the evaluation that holds rows."""
DIAGNOSTICS = {
    "blocks": "side source block text_norm projection_norm instruction_norm cka_before cka_after",
    "attention": "side block share even",
    "words": "side source slot words cosines",
    "warnings": "what text advice",
}
"""The same by list in diagnostics.json."""


@dataclass(frozen=True)
class RunDirectories:
    """Directories of a run whose files the report shows.

    Attributes:
        evaluation: the evaluation.
        prepare: the prepared dataset.
        shards: the training samples.
        training: each trained variant, by name.
    """

    evaluation: Path
    prepare: Path
    shards: Path
    training: Mapping[str, Path]


@dataclass(frozen=True)
class TrainingRecord:
    """One variant's training.

    Attributes:
        done: the manifest; empty until the training ends.
        losses: log lines with a loss, one per step, in order.
        validations: log lines with a validation, one per step, in order.
    """

    done: Row = field(default_factory=dict)
    losses: list[Row] = field(default_factory=list)
    validations: list[Row] = field(default_factory=list)

    @property
    def still_improving(self) -> bool:
        """True if the training ended with the best of several validations."""
        step = self.done.get("step")
        return bool(step) and self.done.get("best_step") == step and len(self.validations) > 1


@dataclass(frozen=True)
class RunFiles(Results):
    """The contents of a run's files; empty for a file that was not written.

    Attributes:
        strata: rows of strata.json.
        examples: rows of examples.json.
        fusion: contents of fusion.json: each fused row's parts.
        diagnostics: contents of diagnostics.json; empty as well if the main variant has no slots.
        training: trainings by variant.
        evaluation: the evaluation's manifest.
        prepared: the prepared dataset's manifest.
        selection: contents of the shards' selection.json.
    """

    strata: list[Row] = field(default_factory=list)
    examples: list[Row] = field(default_factory=list)
    fusion: dict[str, dict[str, Row]] = field(default_factory=dict)
    diagnostics: Row = field(default_factory=dict)
    training: dict[str, TrainingRecord] = field(default_factory=dict)
    evaluation: Row = field(default_factory=dict)
    prepared: Row = field(default_factory=dict)
    selection: Any = field(default_factory=dict)


def read_run(run: RunDirectories, *, say: Say) -> RunFiles:
    """Read every file that the report shows.

    Args:
        run: directories of the run, which must be evaluated; a training that is not there is left out.
        say: prints a line about each damaged line of a log.

    Raises:
        UserError: metrics.json is missing, a file is not valid JSON, or a row lacks a field.
    """
    if not (run.evaluation / "metrics.json").exists():
        raise UserError(f"{run.evaluation} has no metrics.json", "evaluate first: rarec evaluate CONFIG")
    paths = {name: run.evaluation / f"{name}.json" for name in ROWS}
    return RunFiles(
        **{name: _checked(_optional(path, []), ROWS[name], str(path)) for name, path in paths.items()},
        fusion=_optional(run.evaluation / "fusion.json", {}),
        diagnostics=_diagnostics(run.evaluation / "diagnostics.json"),
        training={variant: _training(path, say) for variant, path in run.training.items() if path.is_dir()},
        evaluation=_optional(run.evaluation / MANIFEST, {}),
        prepared=_optional(run.prepare / MANIFEST, {}),
        selection=_optional(run.shards / "selection.json", {}),
    )


def still_improving(training: Mapping[str, TrainingRecord], config: RunConfig) -> str | None:
    """Name the variants whose last validation was their best, and the field that ended their training, or return None.

    Args:
        training: trainings by variant.
        config: the run's configuration.
    """
    names = [name for name in config.variants if name in training and training[name].still_improving]
    if not names:
        return None
    limit, steps = config.train.max_steps, max(training[name].done["step"] for name in names)
    setting = f"train.max_steps (now {limit})" if limit == steps else f"train.epochs (now {config.train.epochs})"
    return f"Still improving at the last step: {listed([variant_title(name) for name in names])}. Raise {setting}."


def _optional(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.exists() else otherwise


def _diagnostics(path: Path) -> Row:
    diagnostics = _optional(path, {})
    if not isinstance(diagnostics, dict):
        raise UserError(f"{path} is not an object", _REMEDY)
    if diagnostics:
        _checked([diagnostics], f"variant n {' '.join(DIAGNOSTICS)}", str(path))
        for name, fields in DIAGNOSTICS.items():
            _checked(diagnostics[name], fields, f"{path}, {name}")
    return diagnostics


def _checked(rows: Any, fields: str, where: str) -> list[Row]:
    """Return a list of records after a check that each has every field that the report reads."""
    if not isinstance(rows, list):
        raise UserError(f"{where} is not a list of rows", _REMEDY)
    for number, row in enumerate(rows, start=1):
        missing = [name for name in fields.split() if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(f"{where}, row {number} lacks `{missing[0]}`", _REMEDY)
    return rows


def _training(directory: Path, say: Say) -> TrainingRecord:
    """Read one variant's manifest and log. A step that a resumed training wrote again counts once.

    An incomplete line is skipped, and a log that differs from the one in the manifest left out, with a line each.
    """
    lines: list[Row] = []
    log, done = directory / "log.jsonl", _optional(directory / MANIFEST, {})
    if done and log.exists() and sha256_file(log) != done.get("log"):
        say(f"{log} was altered since the training: its curve is left out")
        return TrainingRecord(done)
    for number, line in enumerate(read_lines(log) if log.exists() else [], start=1):
        try:
            entry = json.loads(line)
            lines.append({**entry, "step": int(entry["step"])})
        except (ValueError, TypeError, KeyError):
            say(f"{log}, line {number} is incomplete: skipped")
    lines.sort(key=lambda entry: entry["step"])
    losses = {entry["step"]: entry for entry in lines if "loss" in entry}
    validations = {entry["step"]: entry for entry in lines if "validation" in entry}
    return TrainingRecord(done, list(losses.values()), list(validations.values()))
