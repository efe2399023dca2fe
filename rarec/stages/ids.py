"""`rarec ids`: train or import the ID embeddings, and import every further source."""

from rarec.config.identity import vectors_of
from rarec.config.ids import Ids, Import
from rarec.ids.make import drop_progress, make_source, source_identity
from rarec.stages.context import Context


def ids(context: Context) -> None:
    """Make `ids/id/`, `ids/NAME/` for each of the configuration's sources, and `ids/id.all/` beside a held-out `id`."""
    for name, section in vectors_of(context.config).items():
        make(context, name, section)


def make(context: Context, name: str, section: Ids | Import) -> None:
    """Make one of them, unless it is there already."""
    directory, seed = context.paths.source(name), context.config.run.seed
    settings, made_from = source_identity(name, section, context.dataset, seed)
    with context.alone(directory):
        if context.is_done(directory, "ids", settings, made_from):
            return
        if context.fresh:
            drop_progress(directory)
        make_source(name, section, context.dataset, directory, seed, context.say)
