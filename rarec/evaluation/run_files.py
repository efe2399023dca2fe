"""Read back the files of an evaluated run, for its report and the terminal."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST
from rarec.storage.files import read_json, read_lines, sha256_file

Row = dict[str, Any]
Say = Callable[[str], None]
_REMEDY = "evaluate again: rarec evaluate CONFIG --fresh"
_INTERVAL = ("low", "high", "n")
METRIC_FIELDS = ("variant", "metric", "protocol", "value", *_INTERVAL)
COMPARISON_FIELDS = ("variant", "baseline", "metric", "protocol", "difference", *_INTERVAL)
STRATUM_FIELDS = ("variant", "stratum", "bucket", "order", "metric", "value", *_INTERVAL)
EXAMPLE_FIELDS = ("user", "history", "target", "target_rank", "top")
DIAGNOSTIC_FIELDS = {
    "blocks": (
        "side",
        "source",
        "block",
        "text_norm",
        "projection_norm",
        "instruction_norm",
        "cka_before",
        "cka_after",
    ),
    "attention": ("side", "block", "share", "even"),
    "words": ("side", "source", "slot", "words", "cosines"),
    "warnings": ("what", "text", "advice"),
}
"""Fields that the report reads, by list in diagnostics.json."""


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
class RunFiles:
    """The contents of a run's files; empty for a file that was not written.

    Attributes:
        metrics: rows of metrics.json.
        validation: rows of validation.json, in the form of `metrics`: the rows that can be deployed.
        comparisons: rows of comparisons.json.
        strata: rows of strata.json.
        fusion: contents of fusion.json: each fused row's parts.
        examples: rows of examples.json.
        diagnostics: contents of diagnostics.json.
        training: trainings by variant.
        evaluation: the evaluation's manifest.
        prepared: the prepared dataset's manifest.
        selection: contents of the shards' selection.json.
    """

    metrics: list[Row]
    validation: list[Row]
    comparisons: list[Row]
    strata: list[Row]
    fusion: dict[str, dict[str, Row]]
    examples: list[Row]
    diagnostics: Row
    training: dict[str, TrainingRecord]
    evaluation: Row
    prepared: Row
    selection: Any


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
    return RunFiles(
        metrics=_rows(run.evaluation / "metrics.json", METRIC_FIELDS),
        validation=_rows(run.evaluation / "validation.json", METRIC_FIELDS),
        comparisons=_rows(run.evaluation / "comparisons.json", COMPARISON_FIELDS),
        strata=_rows(run.evaluation / "strata.json", STRATUM_FIELDS),
        fusion=_optional(run.evaluation / "fusion.json", {}),
        examples=_rows(run.evaluation / "examples.json", EXAMPLE_FIELDS),
        diagnostics=_diagnostics(run.evaluation / "diagnostics.json"),
        training={variant: _training(path, say) for variant, path in run.training.items() if path.is_dir()},
        evaluation=_optional(run.evaluation / MANIFEST, {}),
        prepared=_optional(run.prepare / MANIFEST, {}),
        selection=_optional(run.shards / "selection.json", {}),
    )


def _optional(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.exists() else otherwise


def _rows(path: Path, fields: tuple[str, ...]) -> list[Row]:
    """Read a list of records and check that each has every field that the report reads."""
    return _checked(_optional(path, []), fields, str(path))


def _diagnostics(path: Path) -> Row:
    """Read diagnostics.json; empty if the main variant has no slots, or the evaluation predates diagnostics."""
    found = _optional(path, {})
    if not isinstance(found, dict):
        raise UserError(f"{path} is not an object", _REMEDY)
    if found:
        _checked([found], ("variant", "n", *DIAGNOSTIC_FIELDS), str(path))
    for name, fields in DIAGNOSTIC_FIELDS.items() if found else ():
        _checked(found[name], fields, f"{path}, {name}")
    return found


def _checked(rows: Any, fields: tuple[str, ...], where: str) -> list[Row]:
    if not isinstance(rows, list):
        raise UserError(f"{where} is not a list of rows", _REMEDY)
    for number, row in enumerate(rows, start=1):
        lacking = [name for name in fields if name not in row] if isinstance(row, dict) else list(fields)
        if lacking:
            raise UserError(f"{where}, row {number} lacks `{lacking[0]}`", _REMEDY)
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
