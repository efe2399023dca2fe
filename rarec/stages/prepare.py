"""`rarec prepare`: logs to a prepared dataset."""

from rarec.data.preparation.inputs import dataset_identity
from rarec.data.preparation.pipeline import prepare_dataset
from rarec.stages.context import Context


def prepare(context: Context) -> None:
    """Make `prepare/`: users, items, interactions, the split, and a manifest with the counts of every step."""
    config = context.config.prepare
    directory = context.paths.prepare
    seed = context.config.run.seed
    with context.alone(directory):
        if not context.is_done(directory, "prepare", *dataset_identity(config, seed)):
            prepare_dataset(config, directory, seed=seed, say=context.say)
