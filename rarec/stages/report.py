"""`rarec report`: one HTML file from what the run left."""

from pathlib import Path

from rarec.artefacts import check_files, is_current, read_manifest
from rarec.config import ARMS
from rarec.config.identity import arm_settings, evaluate_settings
from rarec.evaluation.report import write_report
from rarec.stages.context import Context


def report(context: Context) -> Path:
    """Make `report/report.html` anew: it takes seconds. What its inputs are made from is checked where they are made.

    Raises:
        UserError: there is no evaluation, its files are altered, or it or an arm was made by another configuration.
    """
    config = context.config
    is_current(context.paths.evaluation, "evaluate", evaluate_settings(config), {})
    for name in config.train.arms:
        is_current(context.paths.train(name), "train", arm_settings(config, ARMS[name]), {})
    check_files(context.paths.evaluation, read_manifest(context.paths.evaluation, "evaluate"))
    return write_report(context.paths, context.config, say=context.say)
