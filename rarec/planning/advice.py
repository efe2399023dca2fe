"""Plan a run: recommend an engine, and find the smallest change that makes a training fit, by trying one at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rarec.distributed.hardware import DEVICES, memory_of_rank
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.planning.calculator import Calculator
from rarec.planning.costs import RankMemory
from rarec.planning.setup import ENGINES, REPLICATED, Cluster, EngineName, TrainingSetup

PREFERENCE: tuple[EngineName, ...] = ("0", "2", "3")
MAX_GPUS, MAX_MACHINES = 8, 64
"""Limits of the search for a larger cluster: GPUs in a machine, machines."""
SMALL_CHUNK = 8
"""Prompts encoded at a time, as the last resort."""


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run, for every variant and engine.

    Attributes:
        calculator: calculator of the run.
        variants: names of the variants.
        largest: variant that needs the most memory; all that follows is for it.
        engine: recommended engine; None where none fits.
        reason: why, in a sentence.
        setup: planned setup: with the requested engine, the recommended one, or the first.
        fits: whether the planned setup fits.
        change: nearest setup that fits, where the planned one does not; None where none was found.
    """

    calculator: Calculator
    variants: Sequence[str]
    largest: str
    engine: EngineName | None
    reason: str
    setup: TrainingSetup
    fits: bool
    change: TrainingSetup | None

    @cached_property
    def memories(self) -> dict[EngineName, RankMemory]:
        """The memory of the largest variant by engine, for those that are possible."""
        setups = [replace(self.setup, engine=engine) for engine in ENGINES]
        possible = [setup for setup in setups if not self.calculator.refusal(setup)]
        return {setup.engine: self.calculator.memory(self.largest, setup) for setup in possible}


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
    made = plan(cluster, next((name for name in ENGINES if name == short), ENGINES[0]))
    calculator, setup = made.calculator, made.setup
    need = calculator.memory(variant, setup).peak
    planned = f"by `rarec plan` {calculator.config.train.batch_size} samples a step take {need / 1e9:,.1f} GB"
    problem = f"the device, which has {memory / 1e9:,.1f} GB, ran out of memory while {variant} was trained; {planned}"
    change = setup.changes(made.change or replace(setup, accumulate=2 * setup.accumulate))
    return UserError(problem, f"start it with {' '.join(change)}, or see rarec plan for others")


def plan_variants(
    calculator: Calculator, variants: Sequence[str], cluster: Cluster, engine: EngineName | None
) -> RunPlan:
    """Plan every variant of a run, and recommend an engine; the largest variant decides on engine and changes.

    Args:
        calculator: calculator of the run.
        variants: names of the variants to train.
        cluster: GPUs to train on.
        engine: engine to plan for; None for the recommended one.

    Raises:
        UserError: the batch is too small for the ranks, or the engine cannot shard the weights.
    """
    base = calculator.setup(cluster, engine or PREFERENCE[0])
    names = list(dict.fromkeys(variants))
    largest = max(names, key=lambda variant: calculator.memory(variant, base).peak)
    candidates = (replace(base, engine=each) for each in PREFERENCE)
    best = next((each for each in candidates if calculator.fits(largest, each)), None)
    planned = base if engine or best is None else best
    fits = calculator.fits(largest, planned)
    change = None if fits else smallest_change(calculator, largest, planned)
    recommended = best.engine if best else None
    reason = _reason(calculator, largest, base, best)
    return RunPlan(calculator, names, largest, recommended, reason, planned, fits, change)


def smallest_change(calculator: Calculator, variant: str, setup: TrainingSetup) -> TrainingSetup | None:
    """Return the first change that makes a setup fit; None if there is none.

    Single changes are tried first; then the same with recomputed blocks, with sharding too, and with small chunks too.
    """
    recomputed = replace(setup, checkpointing=True)
    sharded = replace(recomputed, engine=setup.engine if setup.engine == "fsdp2" else "3")
    chunked = replace(sharded, eval_batch=min(SMALL_CHUNK, setup.eval_batch))
    bases = dict.fromkeys((setup, recomputed, sharded, chunked))
    tried = (changed for base in bases for changed in (base, *_changes(calculator, variant, base)))
    return next((changed for changed in tried if calculator.fits(variant, changed)), None)


def _changes(calculator: Calculator, variant: str, base: TrainingSetup) -> Iterator[TrainingSetup]:
    """Yield single changes: smaller chunks (if encoding has the peak), micro-batches, recomputing, sharding, GPUs."""
    if not calculator.refusal(base) and calculator.memory(variant, base).peak_phase == "encoding":
        sizes = (base.eval_batch >> halvings for halvings in range(1, base.eval_batch.bit_length()))
        yield from (replace(base, eval_batch=size) for size in sizes)
    yield from (replace(base, accumulate=number) for number in _doublings(base.accumulate, calculator.batches.smallest))
    yield replace(base, checkpointing=True)
    yield from (replace(base, engine=each) for each in PREFERENCE if base.engine in REPLICATED and each > base.engine)
    cluster = base.cluster
    for gpus in _doublings(cluster.gpus, MAX_GPUS):
        cluster = replace(cluster, gpus=gpus)
        yield replace(base, cluster=cluster)
    for machines in _doublings(cluster.machines, MAX_MACHINES):
        yield replace(base, cluster=replace(cluster, machines=machines))


def _doublings(number: int, limit: int) -> list[int]:
    return [number << times for times in range(1, (limit // number).bit_length())]


def _reason(calculator: Calculator, variant: str, base: TrainingSetup, best: TrainingSetup | None) -> str:
    if best is None:
        return "the run as configured fits with no engine"
    if best.cluster.world_size == 1:
        return "it fits on one GPU"
    zero3 = replace(base, engine="3")
    sent = 0 if calculator.refusal(zero3) else calculator.traffic(variant, zero3).weights / 1e9
    if best.engine == "3":
        whole = calculator.memory(variant, replace(base, engine="2"))
        return (
            f"the whole language model does not fit on each GPU (peak {whole.peak / 1e9:,.1f} GB, "
            f"{whole.frozen / 1e9:,.1f} GB of it frozen weights); sharded it fits, and each rank sends "
            f"{sent:,.1f} GB of weights per step"
        )
    holds_all = "each GPU holds the whole language model and its activations"
    held = holds_all if best.engine == "0" else "it fits with sharded gradients and Adam states"
    saving = f"; ZeRO-3 would send {sent:,.1f} GB of weights per rank and step" if sent else ""
    return f"{held}, and sends no frozen weights{saving}"
