"""Which engine to take, and the smallest change that makes a training fit: tried one by one in the same calculator."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rarec.planning.calculator import Calculator
from rarec.planning.memory import REPLICATED, Stage
from rarec.planning.setting import Cluster, Setting

PREFERRED: tuple[Stage, ...] = ("0", "2", "3")
IN_A_MACHINE, MOST_MACHINES = 8, 64
"""More GPUs are looked for up to here."""
SMALL = 8
"""Prompts of a chunk that is encoded, in the last resort."""


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        stage: the engine that is advised; None where none fits.
        why: in a sentence.
        setting: that is planned: with the stage asked for, the advised one, or the first.
        fits: whether it does.
        change: the nearest setting that fits, where the planned one does not; None where none was found.
    """

    stage: Stage | None
    why: str
    setting: Setting
    fits: bool
    change: Setting | None


def advise(calculator: Calculator, variant: str, cluster: Cluster, asked: Stage | None) -> Advice:
    """For the variant that decides, on this cluster.

    Args:
        calculator: of the run.
        variant: the largest.
        cluster: where to train.
        asked: the stage to plan; None for the one that is advised.

    Raises:
        UserError: the batch is too small for the ranks, or the stage asked for cannot take the weights.
    """
    base = calculator.setting(cluster, asked or PREFERRED[0])
    tried = (replace(base, stage=stage) for stage in PREFERRED)
    advised = next((each for each in tried if calculator.possible(each) and calculator.fits(variant, each)), None)
    planned = base if asked or advised is None else advised
    fits = advised is planned or calculator.fits(variant, planned)
    change = None if fits else smallest_change(calculator, variant, planned)
    why = _why(calculator, variant, base, advised)
    return Advice(advised.stage if advised else None, why, planned, fits, change)


def smallest_change(calculator: Calculator, variant: str, setting: Setting) -> Setting | None:
    """The first change that makes it fit. If none does alone: with recomputed blocks, then sharded, in small chunks."""
    recomputed = replace(setting, checkpointing=True)
    sharded = replace(recomputed, stage=setting.stage if setting.stage == "fsdp2" else "3")
    for base in dict.fromkeys((setting, recomputed, sharded, replace(sharded, encoding=min(SMALL, setting.encoding)))):
        for tried in (base, *_changes(calculator, variant, base)):
            if calculator.possible(tried) and calculator.fits(variant, tried):
                return tried
    return None


def _changes(calculator: Calculator, variant: str, base: Setting) -> Iterator[Setting]:
    """One at a time: smaller chunks, if they are what is too large, more parts, recomputed blocks, sharding, GPUs."""
    if calculator.possible(base) and calculator.account(variant, base).highest == "encoding":
        yield from (replace(base, encoding=size) for size in _halved(base.encoding))
    yield from (replace(base, accumulate=parts) for parts in _doubled(base.accumulate, calculator.batches.smallest))
    yield replace(base, checkpointing=True)
    yield from (replace(base, stage=stage) for stage in PREFERRED if base.stage in REPLICATED and stage > base.stage)
    yield from (replace(base, cluster=cluster) for cluster in _larger(base.cluster))


def _larger(cluster: Cluster) -> Iterator[Cluster]:
    for gpus in _doubled(cluster.gpus, IN_A_MACHINE):
        cluster = replace(cluster, gpus=gpus)
        yield cluster
    yield from (replace(cluster, machines=machines) for machines in _doubled(cluster.machines, MOST_MACHINES))


def _doubled(number: int, most: int) -> Iterator[int]:
    while number * 2 <= most:
        number *= 2
        yield number


def _halved(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number


def _why(calculator: Calculator, variant: str, base: Setting, advised: Setting | None) -> str:
    """In words."""
    if advised is None:
        return "no engine has room for it as it is configured"
    ranks = advised.cluster.ranks
    if ranks == 1:
        return "one GPU holds all of it"
    sharded = calculator.estimate(variant, replace(base, stage="3")).traffic.weights / 1e9 if _shards(calculator) else 0
    spared = f"; under ZeRO-3 each rank would send {sharded:,.1f} GB of weights in a step" if sharded else ""
    if advised.stage == "0":
        return f"each GPU holds the whole language model beside its activations, and sends nothing of it{spared}"
    if advised.stage == "2":
        return f"it fits once Adam and gradients of what trains are sharded, and no frozen weight is sent{spared}"
    whole = calculator.account(variant, replace(base, stage="2"))
    return (
        f"a whole language model on each GPU does not fit (peak {whole.total / 1e9:,.1f} GB, {whole.frozen / 1e9:,.1f} "
        f"of it frozen weights); sharded it does, for {sharded:,.1f} GB of weights that each rank sends in a step"
    )


def _shards(calculator: Calculator) -> bool:
    return calculator.config.llm.quantize == "none"
