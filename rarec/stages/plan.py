"""`rarec plan`: estimate what a training needs, before anything is loaded."""

from collections.abc import Mapping

from rarec.artefacts import MANIFEST, check_settings, read_manifest
from rarec.data.shards.index import open_index
from rarec.errors import UserError
from rarec.models.build import SourceShape
from rarec.planning.advice import RunPlan, plan_variants
from rarec.planning.calculator import Calculator
from rarec.planning.cluster import Cluster, EngineName
from rarec.planning.input_sizes import EpochBatches, SampleStats, source_shape
from rarec.planning.meta_model import MetaModelBuilder
from rarec.stages.run import Run
from rarec.training.feed import batch_plan


def plan(run: Run, cluster: Cluster, engine: EngineName | None) -> RunPlan:
    """Plan every variant of a run; nothing is loaded, and nothing is written.

    Args:
        run: the run.
        cluster: GPUs to train on.
        engine: engine to plan for; None for the recommended one.

    Raises:
        UserError: the language model's configuration or a file of vectors is missing, or the batch is too small.
    """
    config = run.config
    sources = {name: source_shape(section) for name, section in config.sources_by_name.items()}
    builder = MetaModelBuilder(config, sources, run.converted_llm)
    calculator = Calculator(config, builder, _sample_stats(run, sources))
    return plan_variants(calculator, list(config.variants), cluster, engine)


def _sample_stats(run: Run, sources: Mapping[str, SourceShape]) -> SampleStats | None:
    """Describe the samples of the run's shards; None if there are no shards with the configuration's settings."""
    directory, config = run.directory("shards"), run.config
    if not (directory / MANIFEST).exists():
        return None
    manifest = read_manifest(directory, "shards")
    try:
        check_settings(directory, manifest, run.stage("shards").settings())
    except UserError:
        run.say(f"{directory} was made with other settings: the number of samples is unknown")
        return None
    index_S = open_index(directory, manifest)
    tokens_S = index_S["tokens"]
    if not config.train.tokens_per_batch:
        return SampleStats.from_lengths(tokens_S)
    epoch = batch_plan(config, sources, index_S).batches(0)
    return SampleStats.from_lengths(tokens_S, EpochBatches.from_lengths(tokens_S[numbers] for numbers in epoch))
