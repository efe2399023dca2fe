"""Plan a run: recommend an engine, and find the smallest change that makes a training fit, by trying one at a time."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rarec.config import RunConfig
from rarec.distributed.hardware import DEVICES, memory_of_rank
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.planning.calculator import Calculator, Estimate
from rarec.planning.cluster import ENGINES, REPLICATED, Cluster, EngineName, TrainingSetup
from rarec.planning.input_sizes import SampleStats, source_shapes
from rarec.planning.memory import RankMemory
from rarec.planning.meta_model import MetaModelBuilder

PREFERENCE: tuple[EngineName, ...] = ("0", "2", "3")
MAX_GPUS, MAX_MACHINES = 8, 64
"""Limits of the search for a larger cluster: GPUs in a machine, machines."""
SMALL_CHUNK = 8
"""Prompts encoded at a time, as the last resort."""


@dataclass(frozen=True)
class Advice:
    """The recommended engine and setup.

    Attributes:
        engine: recommended engine; None where none fits.
        reason: why, in a sentence.
        setup: planned setup: with the requested engine, the recommended one, or the first.
        fits: whether the planned setup fits.
        change: nearest setup that fits, where the planned one does not; None where none was found.
    """

    engine: EngineName | None
    reason: str
    setup: TrainingSetup
    fits: bool
    change: TrainingSetup | None


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run, for every variant and engine.

    Attributes:
        calculator: calculator of the run.
        estimates: estimate of each variant in the planned setup.
        largest: variant that needs the most memory; the advice is for it.
        memories: memory of that variant by engine.
        advice: recommended engine and setup.
    """

    calculator: Calculator
    estimates: Mapping[str, Estimate]
    largest: str
    memories: Mapping[EngineName, RankMemory]
    advice: Advice


def plan_run(
    config: RunConfig, converted_llm: Path, samples: SampleStats | None, cluster: Cluster, engine: EngineName | None
) -> RunPlan:
    """Plan every variant of a run; no weights are loaded, and nothing is written.

    Args:
        config: configuration of the run.
        converted_llm: the language model as a plain directory, where it comes as a GGUF file.
        samples: samples of the run's shards; None where there are none yet.
        cluster: GPUs to train on.
        engine: engine to plan for; None for the recommended one.

    Raises:
        UserError: the language model's configuration or a file of vectors is missing, or the batch is too small.
    """
    builder = MetaModelBuilder(config, source_shapes(config), converted_llm)
    return plan_variants(Calculator(config, builder, samples), list(config.variants), cluster, engine)


def out_of_memory(variant: str, engine: str, world: World, plan: Callable[[Cluster, EngineName], RunPlan]) -> UserError:
    """Return the error for a GPU that ran out of memory: what `rarec plan` would have said, and the smallest change.

    Args:
        variant: name of the variant that was trained.
        engine: name of the engine, as it calls itself.
        world: its processes.
        plan: plans the run for a cluster and an engine.
    """
    memory = memory_of_rank(world.device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cluster = replace(Cluster.of(local, max(world.size // local, 1), None, DEVICES[0].name), memory=memory)
    short = engine.casefold().removeprefix("zero-")
    made = plan(cluster, next((name for name in ENGINES[1:] if name == short), ENGINES[0]))
    need = made.calculator.memory(variant, made.advice.setup).peak
    enough = made.advice.change or replace(made.advice.setup, accumulate=2 * made.advice.setup.accumulate)
    planned = f"by `rarec plan` {made.calculator.config.train.batch_size} samples a step take {need / 1e9:,.1f} GB"
    problem = f"the device, which has {memory / 1e9:,.1f} GB, ran out of memory while {variant} was trained; {planned}"
    change = " ".join(made.advice.setup.changes(enough))
    return UserError(problem, f"start it with {change}, or see rarec plan for others")


def plan_variants(
    calculator: Calculator, variants: Sequence[str], cluster: Cluster, engine: EngineName | None
) -> RunPlan:
    """Plan every variant of a run; the largest decides on engine and changes.

    Args:
        calculator: calculator of the run.
        variants: names of the variants to train.
        cluster: GPUs to train on.
        engine: engine to plan for; None for the recommended one.

    Raises:
        UserError: the batch is too small for the ranks, or the engine cannot shard the weights.
    """
    first = calculator.setup(cluster, engine or PREFERENCE[0])
    largest = max(dict.fromkeys(variants), key=lambda variant: calculator.memory(variant, first).peak)
    advice = advise(calculator, largest, cluster, engine)
    setups = [replace(advice.setup, engine=each) for each in ENGINES]
    memories = {each.engine: calculator.memory(largest, each) for each in setups if calculator.is_possible(each)}
    estimates = {variant: calculator.estimate(variant, advice.setup) for variant in dict.fromkeys(variants)}
    return RunPlan(calculator, estimates, largest, memories, advice)


def advise(calculator: Calculator, variant: str, cluster: Cluster, engine: EngineName | None) -> Advice:
    """Recommend an engine for a variant on a cluster.

    Args:
        calculator: calculator of the run.
        variant: name of the largest variant.
        cluster: GPUs to train on.
        engine: engine to plan for; None for the recommended one.

    Raises:
        UserError: the batch is too small for the ranks, or the engine cannot shard the weights.
    """
    base = calculator.setup(cluster, engine or PREFERENCE[0])
    candidates = (replace(base, engine=each) for each in PREFERENCE)
    best = next((each for each in candidates if calculator.is_possible(each) and calculator.fits(variant, each)), None)
    planned = base if engine or best is None else best
    fits = best is planned or calculator.fits(variant, planned)
    change = None if fits else smallest_change(calculator, variant, planned)
    reason = _reason(calculator, variant, base, best)
    return Advice(best.engine if best else None, reason, planned, fits, change)


def smallest_change(calculator: Calculator, variant: str, setup: TrainingSetup) -> TrainingSetup | None:
    """Return the first change that makes a setup fit; None if there is none.

    Single changes are tried first; then the same with recomputed blocks, with sharding too, and with small chunks too.
    """
    recomputed = replace(setup, checkpointing=True)
    sharded = replace(recomputed, engine=setup.engine if setup.engine == "fsdp2" else "3")
    chunked = replace(sharded, eval_batch=min(SMALL_CHUNK, setup.eval_batch))
    for base in dict.fromkeys((setup, recomputed, sharded, chunked)):
        for changed in (base, *_changes(calculator, variant, base)):
            if calculator.is_possible(changed) and calculator.fits(variant, changed):
                return changed
    return None


def _changes(calculator: Calculator, variant: str, base: TrainingSetup) -> Iterator[TrainingSetup]:
    """Yield single changes: smaller chunks (if encoding has the peak), micro-batches, recomputing, sharding, GPUs."""
    if calculator.is_possible(base) and calculator.memory(variant, base).peak_phase == "encoding":
        yield from (replace(base, eval_batch=size) for size in _halvings(base.eval_batch))
    yield from (replace(base, accumulate=number) for number in _doublings(base.accumulate, calculator.batches.smallest))
    yield replace(base, checkpointing=True)
    yield from (replace(base, engine=each) for each in PREFERENCE if base.engine in REPLICATED and each > base.engine)
    yield from (replace(base, cluster=cluster) for cluster in _larger_clusters(base.cluster))


def _larger_clusters(cluster: Cluster) -> Iterator[Cluster]:
    for gpus in _doublings(cluster.gpus, MAX_GPUS):
        cluster = replace(cluster, gpus=gpus)
        yield cluster
    yield from (replace(cluster, machines=machines) for machines in _doublings(cluster.machines, MAX_MACHINES))


def _doublings(number: int, limit: int) -> Iterator[int]:
    while number * 2 <= limit:
        number *= 2
        yield number


def _halvings(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


def _reason(calculator: Calculator, variant: str, base: TrainingSetup, best: TrainingSetup | None) -> str:
    if best is None:
        return "the run as configured fits with no engine"
    if best.cluster.world_size == 1:
        return "it fits on one GPU"
    sharded = _zero3_traffic(calculator, variant, base)
    saving = f"; ZeRO-3 would send {sharded:,.1f} GB of weights per rank and step" if sharded else ""
    if best.engine == "0":
        return f"each GPU holds the whole language model and its activations, and sends no frozen weights{saving}"
    if best.engine == "2":
        return f"it fits with sharded gradients and Adam states, and sends no frozen weights{saving}"
    whole = calculator.memory(variant, replace(base, engine="2"))
    return (
        f"the whole language model does not fit on each GPU (peak {whole.peak / 1e9:,.1f} GB, "
        f"{whole.frozen / 1e9:,.1f} GB of it frozen weights); sharded it fits, and each rank sends "
        f"{sharded:,.1f} GB of weights per step"
    )


def _zero3_traffic(calculator: Calculator, variant: str, base: TrainingSetup) -> float:
    """Return the GB of weights that a rank would send in a step under ZeRO-3; 0 where weights cannot be sharded."""
    if calculator.config.llm.quantize != "none":
        return 0
    return calculator.estimate(variant, replace(base, engine="3")).traffic.weights / 1e9
