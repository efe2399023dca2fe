"""`rarec ids`: train or import the ID embeddings, and import every further source."""

from rarec.config.schema import Ids, Import
from rarec.ids.make import make_source, progress_file, source_identity
from rarec.stages.context import Context


def ids(context: Context) -> None:
    """Make `ids/id/`, and `ids/NAME/` for each of the configuration's sources."""
    config = context.config
    sections: dict[str, Ids | Import] = {"id": config.ids, **config.sources}
    for name, section in sections.items():
        directory = context.paths.source(name)
        settings, made_from = source_identity(section, context.dataset, config.run.seed)
        if not context.is_done(directory, "ids", settings, made_from):
            if context.fresh:
                progress_file(directory).unlink(missing_ok=True)
            make_source(name, section, context.dataset, directory, config.run.seed, context.say)
