"""`rarec prepare`: logs to a prepared dataset."""

from rarec.data.prepare import input_hashes
from rarec.data.prepare import prepare as prepare_dataset
from rarec.stages.context import Context


def prepare(context: Context) -> None:
    """Make `prepare/`: users, items, interactions, the split, and a manifest with the counts of every step."""
    config = context.config.prepare
    directory = context.paths.prepare
    settings = context.settings("prepare")
    if context.is_done(directory, "prepare", settings, input_hashes(config)):
        return
    prepare_dataset(config, directory, seed=context.config.run.seed, say=context.say)
