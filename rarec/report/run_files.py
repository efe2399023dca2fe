"""Read back the files of an evaluated run, for its report, and show its figures in the terminal."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rarec.config import RunConfig
from rarec.errors import UserError
from rarec.evaluation.results import (
    BOUNDS_GROUP,
    Results,
    figure,
    listed,
    primary_metric,
    variant_group,
    variant_order,
    variant_title,
)
from rarec.evaluation.verdict import best_variant
from rarec.storage.artefacts import MANIFEST
from rarec.storage.files import read_json, read_lines, sha256_file

Row = dict[str, Any]
Say = Callable[[str], None]


REMEDY = "evaluate again: rarec evaluate CONFIG --fresh"


class _Fields(dict[str, Any]):
    """The fields of a JSON object of an evaluation; one that is missing is an error that names the file."""

    def __init__(self, path: Path, fields: Row) -> None:
        super().__init__(fields)
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise UserError(f"{self.path} lacks `{name}`", REMEDY)


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
        validations: step and metrics of each validation, one per step, in order.
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
        UserError: a file is not valid JSON, or a row lacks a field.
    """
    rows = ("metrics", "comparisons", "validation", "strata", "examples")
    return RunFiles(
        **{name: _read(run.evaluation / f"{name}.json", []) for name in rows},
        fusion=_read(run.evaluation / "fusion.json", {}),
        diagnostics=_read(run.evaluation / "diagnostics.json", {}),
        training={variant: _training(path, say) for variant, path in run.training.items() if path.is_dir()},
        evaluation=_read(run.evaluation / MANIFEST, {}),
        prepared=_read(run.prepare / MANIFEST, {}),
        selection=_read(run.shards / "selection.json", {}),
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
    limit = config.train.max_steps
    steps = max(training[name].done["step"] for name in names)
    setting = f"train.max_steps (now {limit})" if limit == steps else f"train.epochs (now {config.train.epochs})"
    return f"Still improving at the last step: {listed([variant_title(name) for name in names])}. Raise {setting}."


def terminal_table(results: Results, metrics: Sequence[str], width: int) -> Table:
    """Return the table of variants and metrics, but for fusions without one part and oracles.

    Intervals are shown for every metric if the width allows it, else for the primary metric alone, else for none.

    Args:
        results: the figures.
        metrics: the columns, such as `ndcg@10`.
        width: columns of the terminal.
    """
    shown = {variant for variant, metric in results.cells if metric in metrics}
    variants = sorted((name for name in shown if variant_group(name) != BOUNDS_GROUP), key=variant_order)
    with_interval = _with_interval(variants, metrics, width)
    users = max((row["n"] for row in results.cells.values()), default=0)
    caption = f"full catalogue, n={users:,} test users, bootstrap 95% intervals"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", caption=caption)
    table.add_column("")
    for metric in metrics:
        table.add_column(metric.upper(), no_wrap=True)
    for _, group in groupby(variants, variant_group):
        if table.rows:
            table.add_row()
        for variant in group:
            cells = (_cell(results.cells.get((variant, metric)), metric in with_interval) for metric in metrics)
            table.add_row(Text(variant_title(variant)), *cells)
    return table


def closing_lines(files: RunFiles, config: RunConfig) -> list[str]:
    """Return what a run's figures say: trainings that should go on, the best variant, what to deploy.

    Args:
        files: what the run left; see `read_run`.
        config: the run's configuration.
    """
    best = best_variant(files)
    if best is None:
        return []
    improving = still_improving(files.training, config)
    exported = config.export.variant or best.name
    other = f"The bundle holds {variant_title(exported)}: leave out export.variant to export the best row."
    lines = [improving, best.sentence, best.advice, other if exported != best.name else None]
    return [line for line in lines if line]


def _with_interval(variants: Sequence[str], metrics: Sequence[str], width: int) -> set[str]:
    """Return the metrics whose intervals fit."""
    name = max((len(variant_title(variant)) for variant in variants), default=0)
    value, with_interval = len("1.0000"), len(".0000 .0000–.0000")
    for shown in (set(metrics), {primary_metric(metrics)}):
        if name + sum(1 + (with_interval if metric in shown else value) for metric in metrics) <= width:
            return shown
    return set()


def _cell(row: Mapping[str, Any] | None, with_interval: bool) -> Text:
    if row is None:
        return Text("")
    ends = (f" {figure(row['low'])}–{figure(row['high'])}", "dim") if with_interval else ""
    return Text.assemble(figure(row["value"]), ends)


def _read(path: Path, otherwise: Any) -> Any:
    return read_json(path, object_hook=partial(_Fields, path)) if path.exists() else otherwise


def _training(directory: Path, say: Say) -> TrainingRecord:
    """Read one variant's manifest and log. A step that a resumed training wrote again counts once.

    An incomplete line is skipped, and a log that differs from the one in the manifest left out, with a line each.
    """
    log = directory / "log.jsonl"
    done = _read(directory / MANIFEST, {})
    if done and log.exists() and sha256_file(log) != done.get("log"):
        say(f"{log} was altered since the training: its curve is left out")
        return TrainingRecord(done)
    losses: dict[int, Row] = {}
    validations: dict[int, Row] = {}
    for number, line in enumerate(read_lines(log) if log.exists() else [], start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, TypeError, KeyError):
            say(f"{log}, line {number} is incomplete: skipped")
            continue
        if "loss" in entry:
            losses[step] = entry
        if "validation" in entry:
            validations[step] = {"step": step, **entry["validation"]}
    return TrainingRecord(done, *([by_step[step] for step in sorted(by_step)] for by_step in (losses, validations)))
