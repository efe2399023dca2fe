"""`rarec ids`: train or import the ID embeddings, and import every further source."""

from rarec.config.identity import vectors_of
from rarec.ids.make import make_source, progress_file, source_identity
from rarec.stages.context import Context


def ids(context: Context) -> None:
    """Make `ids/id/`, `ids/NAME/` for each of the configuration's sources, and `ids/id.all/` beside a held-out `id`."""
    seed = context.config.run.seed
    for name, section in vectors_of(context.config).items():
        directory = context.paths.source(name)
        settings, made_from = source_identity(name, section, context.dataset, seed)
        with context.alone(directory):
            if context.is_done(directory, "ids", settings, made_from):
                continue
            if context.fresh:
                progress_file(directory).unlink(missing_ok=True)
            make_source(name, section, context.dataset, directory, seed, context.say)
