"""`rarec plan`: estimate what a training needs, before anything is loaded."""

from collections.abc import Mapping

from rarec.artefacts import MANIFEST, read_manifest
from rarec.config.identity import shard_settings, sources_of
from rarec.data.shards.index import open_index
from rarec.models.build import SourceShape
from rarec.planning.advice import RunPlan, plan_variants
from rarec.planning.calculator import Calculator
from rarec.planning.cluster import Cluster, EngineName
from rarec.planning.input_sizes import EpochBatches, SampleStats, source_shape
from rarec.planning.meta_model import MetaModelBuilder
from rarec.stages.context import Context
from rarec.stages.feed import batch_plan


def plan(context: Context, cluster: Cluster, engine: EngineName | None) -> RunPlan:
    """Plan every variant of a run; nothing is loaded, and nothing is written.

    Args:
        context: context of the run.
        cluster: GPUs to train on.
        engine: engine to plan for; None for the recommended one.

    Raises:
        UserError: the language model's configuration or a file of vectors is missing, or the batch is too small.
    """
    config = context.config
    sources = {name: source_shape(section) for name, section in sources_of(config).items()}
    builder = MetaModelBuilder(config, sources, context.paths.llm)
    calculator = Calculator(config, builder, _sample_stats(context, sources))
    return plan_variants(calculator, config.train.variants, cluster, engine)


def _sample_stats(context: Context, sources: Mapping[str, SourceShape]) -> SampleStats | None:
    """Describe the samples of the run's shards; None if there are no shards with the configuration's settings."""
    directory, config = context.paths.shards, context.config
    if not (directory / MANIFEST).exists():
        return None
    manifest = read_manifest(directory, "shards")
    if manifest["settings"] != shard_settings(config):
        context.say(f"{directory} was made with other settings: the number of samples is unknown")
        return None
    index_S = open_index(directory, manifest)
    tokens_S = index_S["tokens"]
    if not config.train.tokens_per_batch:
        return SampleStats.from_lengths(tokens_S)
    epoch = batch_plan(config, sources, index_S).batches(0)
    return SampleStats.from_lengths(tokens_S, EpochBatches.from_lengths(tokens_S[numbers] for numbers in epoch))
