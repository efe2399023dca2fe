"""The HTML report: one self-contained file, rendered only from the files of a run."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from rarec.config import RunConfig, dump_config
from rarec.console.inert import inert
from rarec.errors import UserError
from rarec.evaluation import results
from rarec.evaluation.verdict import parts_worth, sanity_checks, verdict
from rarec.ranking.metrics import SELECTED_BY
from rarec.report import plots
from rarec.report.run_files import Row, RunDirectories, RunFiles, TrainingRecord, read_run, still_improving
from rarec.storage.files import write_text
from rarec.version import __version__

REPORT = "report.html"
INSTALL = "pip install 'rarec[report]'"
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
        UserError: the extra `report` is not installed, or a file is damaged.
    """
    template = _template()
    page = template.render(_context(read_run(run, say=say), config))
    write_text(directory / REPORT, inert(page))


def _template() -> Any:
    try:
        import jinja2
        import matplotlib  # noqa: F401 - refused now rather than half-way
    except ImportError as error:
        raise UserError(f"the report needs {error.name}, which is not installed", INSTALL) from None
    except ValueError as error:
        if "MPLBACKEND" not in os.environ or "backend" not in str(error):  # which matplotlib reads at its import
            raise
        raise UserError(f"MPLBACKEND: {error}", "unset that variable: the report needs none") from None
    loader = jinja2.PackageLoader("rarec", "report")
    strict = jinja2.StrictUndefined
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"variant": results.variant_title, "figure": results.figure, "sentence": results.sentence_case}
    page.filters |= {"in_order": partial(sorted, key=results.variant_order), "number": _number, "details": _details}
    page.globals |= {"interval": results.interval, "version": __version__}
    page.tests["rows"] = _is_rows
    return page.get_template("report.html.j2")


def _context(files: RunFiles, config: RunConfig) -> dict[str, Any]:
    main = config.main_variant.name
    variants = sorted({variant for variant, _ in files.cells}, key=results.variant_order)
    plain = [variant for variant in variants if "/" not in variant]
    listed = {variant for variant, metric in files.cells if metric in results.LIST_METRICS}
    metrics = sorted({metric for _, metric in files.cells}.difference(results.LIST_METRICS), key=results.metric_order)
    headline = results.headline_metrics(metrics)
    first = [f for f in files.findings if f.metric == files.primary and "/" not in f.variant + f.baseline]
    others = [finding for finding in files.findings if finding not in first]
    return {
        "name": Path(config.run.dir).name,
        "config": config,
        "settings": dump_config(config),
        "files": files,
        "main": main,
        "users": max((row["n"] for row in files.cells.values()), default=0),
        "verdict": verdict(files, main, config.run.seed),
        "sanity_checks": sanity_checks(files, main),
        "headline": _table(files, headline, plain),
        "everything": _table(files, metrics, variants),
        "lists": {**_table(files, results.LIST_METRICS, [name for name in variants if name in listed]), "best": ()},
        "parts": parts_worth(files, files.fusion, main, headline),
        "first": first,
        "others": sorted(others, key=lambda finding: results.metric_order(finding.metric)),
        "training": [_cost(variant, training) for variant, training in files.training.items() if training.done],
        "improving": still_improving(files.training, config),
        "plots": _plots(files, plain, headline, first, main),
    }


def _plots(
    files: RunFiles, variants: Sequence[str], headline: Sequence[str], findings: Sequence[results.Finding], main: str
) -> dict[str, list[str]]:
    """Draw every plot for which there is data."""
    fusions = (row + results.CHEAP for row in (*results.baselines(files.values), main + results.FUSED))
    compared = (results.ID_ONLY, main, *fusions, *filter(results.is_external, variants))
    logged = {variant: t for variant, t in files.training.items() if t.losses or t.validations}
    metric = results.primary_metric(row["metric"] for row in files.strata)
    strata = [row for row in files.strata if row["metric"] == metric]
    gains = [row for row in strata if results.MINUS in row["variant"]]
    return {
        "forest": [plots.forest(files.cells, variants, headline)] if variants else [],
        "differences": [plots.differences(findings)] if findings else [],
        "curves": [plots.curves(logged, SELECTED_BY)] if logged else [],
        "strata": [plots.strata(list(rows), compared) for _, rows in groupby(strata, itemgetter("stratum"))],
        "slots_gain": [plots.slots_gain(gains)] if gains else [],
        "alignment": list(plots.alignment(files.diagnostics)) if files.diagnostics else [],
    }


def _table(files: RunFiles, metrics: Sequence[str], variants: Sequence[str]) -> dict[str, Any]:
    """Lay out variants and metrics in groups; `best` holds each column's highest cell of a row without `/`."""
    groups = [(results.GROUPS[group], list(names)) for group, names in groupby(variants, results.variant_group)]
    best = set()
    for metric in metrics:
        column = {v: files.cells[v, metric]["value"] for v in variants if "/" not in v and (v, metric) in files.cells}
        best |= {(variant, metric) for variant, value in column.items() if value == max(column.values())}
    return {"metrics": metrics, "groups": groups, "best": best}


def _cost(variant: str, training: TrainingRecord) -> Row:
    """Lay out what a training took; medians over its steps."""
    logged = {
        name: [line[name] for line in training.losses if line.get(name) is not None]
        for name in ("tokens_per_s", "data_wait")
    }
    medians = {name: median(values) if values else None for name, values in logged.items()}
    done = {name: training.done.get(name) for name in ("trainable_parameters", "seconds", "step", "best_step")}
    return {"variant": variant, **done, **medians}


def _details(manifest: Row) -> Row:
    return {name: value for name, value in manifest.items() if name not in _IDENTITY}


def _number(value: Any) -> str:
    """Format a value of free-form JSON."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}"  # a seed may be larger than a float holds
    return str(value)


def _is_rows(value: Any) -> bool:
    """Return True for a table: a list of JSON objects with the same fields."""
    fields = {tuple(row) if isinstance(row, dict) else () for row in value} if isinstance(value, list) else ()
    return len(fields) == 1 and () not in fields
