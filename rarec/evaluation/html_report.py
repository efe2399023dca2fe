"""The HTML report: one self-contained file, made only from what a run left on disk."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import rarec
from rarec.config import RunConfig, dump_config
from rarec.errors import UserError
from rarec.evaluation import plots
from rarec.evaluation.labels import (
    FULL,
    HEADLINE,
    ID_ONLY,
    LATE_FUSION,
    figure,
    interval,
    metric_order,
    metric_title,
    primary_metric,
    variant_group,
    variant_order,
    variant_title,
)
from rarec.evaluation.run_files import Row, RunRecord, TrainingRecord, read_run
from rarec.evaluation.verdict import Finding, sanity_checks, verdict
from rarec.files import new_directory, write_text
from rarec.paths import RunPaths
from rarec.ranking.metrics import SELECTED_BY

REPORT = "report.html"
_IDENTITY = ("kind", "schema", "settings", "made_from", "files", "hash")
_GROUPS = (
    "Each variant alone",
    "With the ID model's score added (late fusion)",
    "With the log of an item's popularity added as well",
    "Sanity checks",
)


def write_report(run_dir: RunPaths, config: RunConfig, *, say: Callable[[str], None]) -> Path:
    """Write `report/report.html` from the files of a run; equal files give equal bytes.

    Args:
        run_dir: the run, evaluated; what else it lacks is left out of the report.
        config: of the run.
        say: told what was skipped, and where the report lies.

    Returns:
        The path of the report.

    Raises:
        UserError: the extra `report` is not installed, metrics.json is missing, or a file is not as it should be.
    """
    template = _template()
    record = read_run(run_dir, config.train.variants, say=say)
    page = template.render(_context(record, config, run_dir.root.name))
    with new_directory(run_dir.report) as aside:
        write_text(aside / REPORT, page)
    path = run_dir.report / REPORT
    say(f"report: {path}")
    return path


def _template() -> Any:
    try:
        import jinja2
        import matplotlib  # noqa: F401 - said now rather than half-way
    except ImportError as error:
        raise UserError(
            f"the report needs {error.name}, which is not installed", "pip install 'rarec[report]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rarec", "evaluation"),
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


def _context(record: RunRecord, config: RunConfig, name: str) -> dict[str, Any]:
    main, seed = config.export.variant, config.run.seed
    full = [row for row in record.metrics if row["protocol"] == FULL]
    findings = [Finding.of(row) for row in record.comparisons if row["protocol"] == FULL]
    primary = primary_metric(row["metric"] for row in full)
    first = [f for f in findings if f.metric == primary and "/" not in f.variant + f.baseline]
    return {
        "name": name,
        "version": rarec.__version__,
        "config": config,
        "settings": dump_config(config),
        "main": main,
        "primary": primary,
        "users": max((row["n"] for row in full), default=0),
        "verdict": verdict(record.metrics, record.comparisons, main, seed),
        "sanity_checks": sanity_checks(record.metrics, record.comparisons, main),
        "headline": _table(full, _headline_metrics(full), with_sanity_checks=False),
        "everything": _table(full, sorted({row["metric"] for row in full}, key=metric_order), with_sanity_checks=True),
        "first": first,
        "others": sorted((f for f in findings if f not in first), key=lambda f: metric_order(f.metric)),
        "examples": [_example(row) for row in record.examples],
        "diagnostics": record.diagnostics,
        "diagnosed": [_markup(svg) for svg in plots.every(record.diagnostics)] if record.diagnostics else [],
        "counts": record.prepared.get("counts", {}),
        "prepared": _figures(record.prepared),
        "selection": record.selection,
        "evaluation": _figures(record.evaluation),
        "evaluation_hash": record.evaluation.get("hash", ""),
        "training": [_training(variant, training) for variant, training in record.training.items() if training.done],
        "plots": _plots(record, full, first),
        "strata": _strata(record, (ID_ONLY, "text_only", LATE_FUSION, main)),
    }


def _plots(record: RunRecord, full: Sequence[Row], findings: Sequence[Finding]) -> dict[str, Any]:
    """Every plot of the whole run that there is data for."""
    variants = _variants(full, with_sanity_checks=False)
    logged = {variant: t for variant, t in record.training.items() if t.losses or t.validations}
    return {
        "forest": _markup(plots.forest(full, variants, _headline_metrics(full))) if variants else None,
        "differences": _markup(plots.differences(findings)) if findings else None,
        "curves": _markup(plots.curves(logged, SELECTED_BY)) if logged else None,
    }


def _strata(record: RunRecord, wanted: Sequence[str]) -> list[Any]:
    """One plot a stratum, of the variants that matter most."""
    metric = primary_metric(row["metric"] for row in record.strata)
    rows = [row for row in record.strata if row["metric"] == metric]
    there = {row["variant"] for row in rows}
    variants = [variant for variant in dict.fromkeys(wanted) if variant in there]
    names = dict.fromkeys(row["stratum"] for row in rows)
    return [_markup(plots.strata([r for r in rows if r["stratum"] == name], name, metric, variants)) for name in names]


def _markup(svg: str) -> Any:
    """Drawn here from escaped texts, so the template may take it as it is."""
    from markupsafe import Markup

    return Markup(svg)


def _headline_metrics(rows: Iterable[Row]) -> list[str]:
    """The four that everyone reads; with other cutoffs, the first four that there are."""
    there = {row["metric"] for row in rows}
    known = [metric for metric in HEADLINE if metric in there]
    return known if len(known) > 1 else sorted(there, key=metric_order)[:4]


def _variants(rows: Iterable[Row], *, with_sanity_checks: bool) -> list[str]:
    return sorted(
        {row["variant"] for row in rows if with_sanity_checks or "/" not in row["variant"]}, key=variant_order
    )


def _table(rows: Sequence[Row], metrics: Sequence[str], *, with_sanity_checks: bool) -> dict[str, Any]:
    """Variants x metrics in groups, and the highest value of every column (sanity checks do not compete)."""
    cells = {(row["variant"], row["metric"]): row for row in rows}
    variants = _variants(rows, with_sanity_checks=with_sanity_checks)
    groups = [
        (title, [variant for variant in variants if variant_group(variant) == place])
        for place, title in enumerate(_GROUPS)
    ]
    best = set()
    for metric in metrics:
        baselines = [
            (row["value"], row["variant"]) for row in rows if row["metric"] == metric and "/" not in row["variant"]
        ]
        best |= {(variant, metric) for value, variant in baselines if value == max(baselines)[0]}
    return {"metrics": metrics, "cells": cells, "groups": [g for g in groups if g[1]], "best": best}


def _example(row: Row) -> Row:
    """One user; each list says which of its places holds the target."""
    variants = sorted(row["top"], key=variant_order)
    lists = [
        {"variant": variant, "rank": row["target_rank"][variant], "titles": titles, "hits": _hits(titles, row, variant)}
        for variant, titles in ((variant, row["top"][variant]) for variant in variants)
    ]
    return {**{name: row[name] for name in ("user", "history", "target")}, "lists": lists}


def _hits(titles: Sequence[str], row: Row, variant: str) -> set[int]:
    """Places of the target: where its rank says, else (ties count against the model) wherever its title stands."""
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


def _figures(manifest: Row) -> Row:
    """What a manifest tells beyond its identity."""
    return {name: value for name, value in manifest.items() if name not in _IDENTITY}


def _number(value: Any) -> str:
    """Free-form figures as people read them."""
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
    """Whether a JSON value is a table: a list of objects with the same fields."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and row.keys() == value[0].keys() for row in value)
    )
