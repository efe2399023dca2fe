"""`rarec report`: one HTML file from what the run left."""

from pathlib import Path

from rarec.artefacts import check_files, read_manifest
from rarec.evaluation.report import write_report
from rarec.stages.context import Context


def report(context: Context) -> Path:
    """Make `report/report.html` anew: it takes seconds, and its inputs are checked where they are made."""
    check_files(context.paths.evaluation, read_manifest(context.paths.evaluation, "evaluate"))
    return write_report(context.paths, context.config, say=context.say)
