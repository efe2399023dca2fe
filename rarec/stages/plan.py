"""`rarec plan`: estimate what a training needs, before anything is loaded."""

import os
from collections.abc import Mapping
from dataclasses import replace

from rarec.data.shards.feed import batch_plan
from rarec.data.shards.files import open_index
from rarec.distributed.hardware import DEVICES, memory_of_rank
from rarec.errors import UserError
from rarec.models.build import SourceShape, slots_reserved
from rarec.planning.advice import RunPlan, plan_variants
from rarec.planning.calculator import Calculator
from rarec.planning.cluster import ENGINES, Cluster, EngineName
from rarec.planning.input_sizes import EpochBatches, SampleStats, source_shape
from rarec.planning.meta_model import MetaModelBuilder
from rarec.stages.run import Run
from rarec.storage.artefacts import MANIFEST, check_settings, read_manifest


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


def out_of_memory(run: Run, variant: str) -> UserError:
    """Return the error for a GPU that ran out of memory: what `rarec plan` would have said, and the smallest change."""
    world = run.world
    total, local = memory_of_rank(world.device), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cluster = replace(Cluster.of(local, max(world.size // local, 1), None, DEVICES[0].name), memory=total)
    engine: EngineName = "0"
    for name in ENGINES[1:]:
        engine = name if run.engine.name.casefold().removeprefix("zero-") == name else engine
    made = plan(run, cluster, engine)
    need = made.calculator.memory(variant, made.advice.setup).peak
    enough = made.advice.change or replace(made.advice.setup, accumulate=2 * made.advice.setup.accumulate)
    said = f"by `rarec plan` {made.calculator.config.train.batch_size} samples a step take {need / 1e9:,.1f} GB"
    problem = f"the device, which has {total / 1e9:,.1f} GB, ran out of memory while {variant} was trained; {said}"
    change = " ".join(made.advice.setup.changes(enough))
    return UserError(problem, f"start it with {change}, or see rarec plan for others")


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
    user_slots = sum(slots_reserved(config, sources)["user"].values())
    epoch = (tokens_S[numbers] for numbers in batch_plan(config, user_slots, index_S).batches(0))
    return SampleStats.from_lengths(tokens_S, EpochBatches.from_lengths(epoch, config.llm.packing))
