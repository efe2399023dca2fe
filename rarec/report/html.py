"""The HTML report: one self-contained file, rendered only from the files of a run."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rarec.config import RunConfig, dump_config
from rarec.console.inert import inert
from rarec.errors import UserError
from rarec.evaluation.findings import Finding, parts_worth, sanity_checks
from rarec.evaluation.labels import (
    CHEAP,
    FULL,
    FUSED,
    GROUPS,
    ID_ONLY,
    MINUS,
    baselines,
    figure,
    headline_metrics,
    interval,
    is_external,
    metric_order,
    metric_title,
    primary_metric,
    variant_group,
    variant_order,
    variant_title,
)
from rarec.evaluation.run_files import Row, RunDirectories, RunFiles, TrainingRecord, read_run
from rarec.evaluation.verdict import still_improving, verdict
from rarec.ranking.metrics import SELECTED_BY
from rarec.report import plots
from rarec.storage.files import write_text
from rarec.version import __version__

REPORT = "report.html"
_IDENTITY = ("kind", "schema", "settings", "made_from", "files", "hash")
"""Fields of a manifest that identify an artefact; the report shows the others."""


def write_report(directory: Path, run: RunDirectories, config: RunConfig, *, say: Callable[[str], None]) -> None:
    """Write `report.html` from the files of a run. Equal files give equal bytes.

    Args:
        directory: directory to write to.
        run: directories of the run, which must be evaluated. Sections whose files are missing are left out.
        config: the run's configuration.
        say: prints one line to the user.

    Raises:
        UserError: the extra `report` is not installed, metrics.json is missing, or a file is damaged.
    """
    template = _template()
    page = template.render(_context(read_run(run, say=say), config, Path(config.run.dir).name))
    write_text(directory / REPORT, inert(page))


def _template() -> Any:
    try:
        import jinja2
        import matplotlib  # noqa: F401 - refused now rather than half-way
    except ImportError as error:
        raise UserError(
            f"the report needs {error.name}, which is not installed", "pip install 'rarec[report]'"
        ) from None
    except ValueError as error:
        if "MPLBACKEND" not in os.environ or "backend" not in str(error):  # which matplotlib reads at its import
            raise
        raise UserError(f"MPLBACKEND: {error}", "unset that variable: the report needs none") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rarec", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "variant": variant_title,
        "metric": metric_title,
        "figure": figure,
        "signed": lambda value: figure(value, signed=True),
        "number": _number,
    }
    environment.globals |= {"interval": interval}
    environment.tests["rows"] = _is_rows
    return environment.get_template("report.html.j2")


def _context(files: RunFiles, config: RunConfig, name: str) -> dict[str, Any]:
    main, seed = config.main_variant.name, config.run.seed
    full = [row for row in files.metrics if row["protocol"] == FULL]
    findings = [Finding.of(row) for row in files.comparisons if row["protocol"] == FULL]
    primary = primary_metric(row["metric"] for row in full)
    first = [f for f in findings if f.metric == primary and "/" not in f.variant + f.baseline]
    headline = headline_metrics(row["metric"] for row in full)
    return {
        "name": name,
        "version": __version__,
        "config": config,
        "settings": dump_config(config),
        "main": main,
        "primary": primary,
        "users": max((row["n"] for row in full), default=0),
        "verdict": verdict(files.metrics, files.comparisons, files.validation, main, seed),
        "sanity_checks": sanity_checks(files.metrics, files.comparisons, main),
        "headline": _table(full, headline, every_row=False),
        "everything": _table(full, sorted({row["metric"] for row in full}, key=metric_order), every_row=True),
        "parts": parts_worth(files.comparisons, files.fusion, main, headline),
        "first": first,
        "others": sorted((f for f in findings if f not in first), key=lambda f: metric_order(f.metric)),
        "examples": [_example(row) for row in files.examples],
        "diagnostics": files.diagnostics,
        "counts": files.prepared.get("counts", {}),
        "prepared": _shown(files.prepared),
        "selection": files.selection,
        "evaluation": _shown(files.evaluation),
        "evaluation_hash": files.evaluation.get("hash", ""),
        "training": [_training(variant, training) for variant, training in files.training.items() if training.done],
        "improving": still_improving(files.training, config),
        "plots": _plots(files, full, first, main),
    }


def _plots(files: RunFiles, full: Sequence[Row], findings: Sequence[Finding], main: str) -> Row:
    """Draw every plot for which there is data; None or an empty list for the others."""
    from markupsafe import Markup  # plots escape their texts themselves

    variants = _variants(full, every_row=False)
    metrics = headline_metrics(row["metric"] for row in full)
    fusions = (row + CHEAP for row in (*baselines(row["variant"] for row in full), main + FUSED))
    compared = (ID_ONLY, main, *fusions, *filter(is_external, variants))
    logged = {variant: t for variant, t in files.training.items() if t.losses or t.validations}
    return {
        "forest": Markup(plots.forest(full, variants, metrics)) if variants else None,
        "differences": Markup(plots.differences(findings)) if findings else None,
        "curves": Markup(plots.curves(logged, SELECTED_BY)) if logged else None,
        "strata": [Markup(svg) for svg in _strata(files.strata, compared)],
        "slots_gain": [Markup(plots.slots_gain(rows)) for rows in _differences(files.strata)],
        "alignment": [Markup(svg) for svg in plots.alignment(files.diagnostics)] if files.diagnostics else [],
    }


def _strata(rows: Sequence[Row], compared: Sequence[str]) -> Iterator[str]:
    """Draw one plot per stratum, of the variants to compare."""
    metric = primary_metric(row["metric"] for row in rows)
    rows = [row for row in rows if row["metric"] == metric]
    there = {row["variant"] for row in rows}
    variants = [variant for variant in dict.fromkeys(compared) if variant in there]
    for name in dict.fromkeys(row["stratum"] for row in rows):
        yield plots.strata([row for row in rows if row["stratum"] == name], name, metric, variants)


def _differences(strata: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows of each difference in the primary metric."""
    metric = primary_metric(row["metric"] for row in strata)
    rows = [row for row in strata if row["metric"] == metric and MINUS in row["variant"]]
    for name in dict.fromkeys(row["variant"] for row in rows):
        yield [row for row in rows if row["variant"] == name]


def _variants(rows: Iterable[Row], *, every_row: bool) -> list[str]:
    return sorted({row["variant"] for row in rows if every_row or "/" not in row["variant"]}, key=variant_order)


def _table(rows: Sequence[Row], metrics: Sequence[str], *, every_row: bool) -> dict[str, Any]:
    """Lay out variants and metrics in groups; `best` holds each column's highest cell of a row without `/`."""
    cells = {(row["variant"], row["metric"]): row for row in rows}
    variants = _variants(rows, every_row=every_row)
    groups = [(title, [v for v in variants if variant_group(v) == place]) for place, title in enumerate(GROUPS)]
    best = set()
    for metric in metrics:
        column = {row["variant"]: row["value"] for row in rows if row["metric"] == metric and "/" not in row["variant"]}
        best |= {(variant, metric) for variant, value in column.items() if value == max(column.values())}
    return {"metrics": metrics, "cells": cells, "groups": [g for g in groups if g[1]], "best": best}


def _example(row: Row) -> Row:
    """Lay out one user: a list per variant, with the places of the target in it."""
    lists = [
        {"variant": variant, "rank": row["target_rank"][variant], "titles": titles, "hits": _hits(titles, row, variant)}
        for variant, titles in sorted(row["top"].items(), key=lambda item: variant_order(item[0]))
    ]
    return {**{name: row[name] for name in ("user", "history", "target")}, "lists": lists}


def _hits(titles: Sequence[str], row: Row, variant: str) -> set[int]:
    """Return the target's places: its rank, or, since a tie may give it a lower one, every place with its title."""
    rank = row["target_rank"][variant]
    same = {place for place, title in enumerate(titles, start=1) if title == row["target"]}
    return {rank} if rank in same else same


def _training(variant: str, training: TrainingRecord) -> dict[str, Any]:
    done = training.done
    rates = [line["tokens_per_s"] for line in training.losses if line.get("tokens_per_s") is not None]
    waits = [line["data_wait"] for line in training.losses if line.get("data_wait") is not None]
    return {
        "variant": variant,
        "parameters": done.get("trainable_parameters"),
        "steps": done.get("steps", done.get("step")),
        "best_step": done.get("best_step"),
        "seconds": done.get("seconds"),
        "tokens_per_s": median(rates) if rates else None,
        "data_wait": median(waits) if waits else None,
    }


def _shown(manifest: Row) -> Row:
    return {name: value for name, value in manifest.items() if name not in _IDENTITY}


def _number(value: Any) -> str:
    """Format a value of free-form JSON."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _is_rows(value: Any) -> bool:
    """Return True for a table: a list of JSON objects with the same fields."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and row.keys() == value[0].keys() for row in value)
    )
