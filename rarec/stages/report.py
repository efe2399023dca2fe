"""`rarec report`: one HTML file from what the run left."""

from pathlib import Path

from rarec.artefacts import is_current
from rarec.config import VARIANTS
from rarec.config.identity import variant_settings
from rarec.evaluation.html_report import write_report
from rarec.stages.context import Context
from rarec.stages.trained import finished_evaluation


def report(context: Context) -> Path:
    """Make `report/report.html` anew: it takes seconds. What its inputs are made from is checked where they are made.

    Raises:
        UserError: there is no evaluation, its files are altered, it is of other weights than lie here, or it or a variant
            was made by another configuration.
    """
    config = context.config
    finished_evaluation(context)
    for name in config.train.variants:
        is_current(context.paths.train(name), "train", variant_settings(config, VARIANTS[name]), {})
    return write_report(context.paths, context.config, say=context.say)
