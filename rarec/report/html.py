"""The HTML report: one self-contained file, rendered only from the files of a run."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rarec.config import RunConfig, dump_config
from rarec.console.inert import inert
from rarec.errors import UserError
from rarec.evaluation.labels import (
    CHEAP,
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
from rarec.evaluation.verdict import Finding, parts_worth, sanity_checks, verdict
from rarec.ranking.metrics import SELECTED_BY
from rarec.report import plots
from rarec.report.run_files import Row, RunDirectories, RunFiles, TrainingRecord, read_run, still_improving
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
    page = template.render(_context(read_run(run, say=say), config))
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
    environment.filters |= {"variant": variant_title, "metric": metric_title, "figure": figure, "number": _number}
    environment.globals |= {"interval": interval, "version": __version__}
    environment.tests["rows"] = _is_rows
    return environment.get_template("report.html.j2")


def _context(files: RunFiles, config: RunConfig) -> dict[str, Any]:
    main = config.main_variant.name
    metrics = {row["metric"] for row in files.full}
    headline = headline_metrics(metrics)
    first = [f for f in files.findings if f.metric == files.primary and "/" not in f.variant + f.baseline]
    others = [finding for finding in files.findings if finding not in first]
    return {
        "name": Path(config.run.dir).name,
        "config": config,
        "settings": dump_config(config),
        "files": files,
        "main": main,
        "users": max((row["n"] for row in files.full), default=0),
        "verdict": verdict(files, main, config.run.seed),
        "sanity_checks": sanity_checks(files, main),
        "headline": _table(files.full, headline, _variants(files)),
        "everything": _table(files.full, sorted(metrics, key=metric_order), _variants(files, every_row=True)),
        "parts": parts_worth(files, files.fusion, main, headline),
        "first": first,
        "others": sorted(others, key=lambda finding: metric_order(finding.metric)),
        "examples": [{**row, "lists": _example_lists(row)} for row in files.examples],
        "prepared": _shown(files.prepared),
        "evaluation": _shown(files.evaluation),
        "training": [_cost(variant, training) for variant, training in files.training.items() if training.done],
        "improving": still_improving(files.training, config),
        "plots": _plots(files, headline, first, main),
    }


def _plots(files: RunFiles, headline: Sequence[str], findings: Sequence[Finding], main: str) -> dict[str, Any]:
    """Draw every plot for which there is data; None or an empty list for the others."""
    from markupsafe import Markup  # plots escape their texts themselves

    variants = _variants(files)
    fusions = (row + CHEAP for row in (*baselines(files.values), main + FUSED))
    compared = (ID_ONLY, main, *fusions, *filter(is_external, variants))
    logged = {variant: t for variant, t in files.training.items() if t.losses or t.validations}
    strata = [row for row in files.strata if row["metric"] == primary_metric(row["metric"] for row in files.strata)]
    gains = _grouped([row for row in strata if MINUS in row["variant"]], "variant")
    return {
        "forest": Markup(plots.forest(files.full, variants, headline)) if variants else None,
        "differences": Markup(plots.differences(findings)) if findings else None,
        "curves": Markup(plots.curves(logged, SELECTED_BY)) if logged else None,
        "strata": [Markup(plots.strata(rows, compared)) for rows in _grouped(strata, "stratum")],
        "slots_gain": [Markup(plots.slots_gain(rows)) for rows in gains],
        "alignment": [Markup(svg) for svg in plots.alignment(files.diagnostics)] if files.diagnostics else [],
    }


def _grouped(rows: Sequence[Row], name: str) -> Iterator[list[Row]]:
    """Yield the rows of each value of a field."""
    for value in dict.fromkeys(row[name] for row in rows):
        yield [row for row in rows if row[name] == value]


def _variants(files: RunFiles, *, every_row: bool = False) -> list[str]:
    """Return the evaluated rows in their order; without `every_row` those alone that have no `/`."""
    return sorted({row["variant"] for row in files.full if every_row or "/" not in row["variant"]}, key=variant_order)


def _table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], variants: Sequence[str]) -> dict[str, Any]:
    """Lay out variants and metrics in groups; `best` holds each column's highest cell of a row without `/`."""
    cells = {(row["variant"], row["metric"]): row for row in rows}
    groups = [(title, [v for v in variants if variant_group(v) == place]) for place, title in enumerate(GROUPS)]
    best = set()
    for metric in metrics:
        column = {v: cells[v, metric]["value"] for v in variants if "/" not in v and (v, metric) in cells}
        best |= {(variant, metric) for variant, value in column.items() if value == max(column.values())}
    return {"metrics": metrics, "cells": cells, "groups": [group for group in groups if group[1]], "best": best}


def _example_lists(example: Row) -> list[Row]:
    """Lay out the list of each variant for one user, with the target's places in it.

    They are its rank, or, since a tie may give it a lower one, every place with its title.
    """
    lists = []
    for variant, titles in sorted(example["top"].items(), key=lambda item: variant_order(item[0])):
        rank = example["target_rank"][variant]
        places = {place for place, title in enumerate(titles, start=1) if title == example["target"]}
        hits = {rank} if rank in places else places
        lists.append({"variant": variant, "rank": rank, "titles": titles, "hits": hits})
    return lists


def _cost(variant: str, training: TrainingRecord) -> Row:
    """Lay out what a training took; medians over its steps."""

    def middle(name: str) -> float | None:
        known = [line[name] for line in training.losses if line.get(name) is not None]
        return median(known) if known else None

    done = training.done
    steps = {"steps": done.get("steps", done.get("step")), "best_step": done.get("best_step")}
    cost = {"parameters": done.get("trainable_parameters"), "seconds": done.get("seconds")}
    return {"variant": variant, **cost, **steps, **{name: middle(name) for name in ("tokens_per_s", "data_wait")}}


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
