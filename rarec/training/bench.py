"""Measure where the time of a training step goes, beside the bare language model, and advise what to change."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from rarec.config import RunConfig
from rarec.models.towers import RaRec, SideBatch
from rarec.training.batches import Batch
from rarec.training.loop import Trainer

PHASES = ("waiting for data", "forward", "losses", "backward", "update")
WARM_UP = 2
"""Steps that are not counted: the allocator, the workers and the processor's caches are cold."""
MUCH_WAITING, MUCH_PADDING, FAR = 0.05, 0.2, 0.8
"""Shares of waiting and padding, and of the bare model's speed, beyond which something is advised."""


@dataclass(frozen=True)
class StepProfile:
    """What was measured of a variant's steps; medians.

    Attributes:
        variant: its name.
        seconds: of each phase of a step.
        tokens: text and slots of a step, without padding, on this process.
        padding: share of the positions that are padding.
        bare: seconds that the frozen model takes for as many tokens without padding, forward and backward.
        advice: what to change, most useful first.
    """

    variant: str
    seconds: dict[str, float]
    tokens: float
    padding: float
    bare: float
    advice: list[str] = field(default_factory=list)

    @property
    def step(self) -> float:
        """Return the seconds of a step."""
        return sum(self.seconds.values())

    @property
    def of_bare(self) -> float:
        """Return the speed in tokens a second, relative to the bare model's."""
        return self.bare / self.step

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table."""
        shares = [(name, f"{1000 * spent:,.0f} ms, {spent / self.step:.0%}") for name, spent in self.seconds.items()]
        return [
            *shares,
            ("step", f"{1000 * self.step:,.0f} ms, {self.tokens / self.step:,.0f} tokens/s"),
            ("padding", f"{self.padding:.0%} of all positions"),
            ("language model alone", f"{1000 * self.bare:,.0f} ms for as many tokens: rarec has {self.of_bare:.0%}"),
        ]


def bench(trainer: Trainer, variant: str, steps: int, config: RunConfig) -> StepProfile:
    """Take some steps of a training from its first weights on, and measure them; nothing is written.

    With `train.accumulate`, what counts as a step here is one of its parts, and an update.

    Args:
        trainer: of the variant.
        variant: its name.
        steps: number of steps that are counted.
        config: of the run.
    """
    spent: dict[str, list[float]] = {name: [] for name in PHASES}
    batches: list[Batch] = []
    trainer.model.train()
    with trainer.loader.open(0, steps + WARM_UP) as loaded:
        for _ in range(steps + WARM_UP):
            batches.append(_step(trainer, loaded, spent))
    bare = [_bare_seconds(trainer.model, batch) for batch in batches]
    trainer.optimisation.end()
    tokens = [batch.tokens for batch in batches[WARM_UP:]]
    padded = [batch.users.mask_BT.numel() + batch.items.mask_BT.numel() for batch in batches[WARM_UP:]]
    seconds = {name: statistics.median(times[WARM_UP:]) for name, times in spent.items()}
    profile = StepProfile(
        variant, seconds, statistics.median(tokens), 1 - sum(tokens) / sum(padded), statistics.median(bare[WARM_UP:])
    )
    profile.advice.extend(_advice(config, trainer.world.device.type, profile))
    return profile


def _step(trainer: Trainer, batches: Iterator[Batch], spent: dict[str, list[float]]) -> Batch:
    """Take a step as the training loop does, and add the seconds of each phase."""

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        started = _now(trainer)
        yield
        spent[name].append(_now(trainer) - started)

    with phase("waiting for data"):
        batch = next(batches)
    with trainer.optimisation.part(last=True):
        with phase("forward"):
            encoded = trainer.optimisation({"user": batch.users, "item": batch.items})
        with phase("losses"):
            losses = trainer.objective(trainer.model, encoded["user"], encoded["item"], batch.targets)
        with phase("backward"):
            trainer.optimisation.backward(losses.total)
    with phase("update"):
        trainer.optimisation.update(0.0)  # the weights stay: a step's duration does not depend on them
    return batch


def _now(trainer: Trainer) -> float:
    """Return the time once the device has done what it was given."""
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _bare_seconds(model: RaRec, batch: Batch) -> float:
    """Return the seconds of the frozen model, forward and backward, on as many tokens without padding."""
    started = time.perf_counter()
    for side in (batch.users, batch.items):
        _bare_pass(model, side)
    if batch.users.ids_BT.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _bare_pass(model: RaRec, side: SideBatch) -> None:
    trunk: Any = model.backbone.trunk
    length = max(1, round(float(side.mask_BT.sum()) / len(side.mask_BT)))
    embedded = trunk.get_input_embeddings()(side.ids_BT[:, :length]).detach().requires_grad_()
    trunk(inputs_embeds=embedded).last_hidden_state.float().mean().backward()


def _advice(config: RunConfig, device: str, profile: StepProfile) -> Iterator[str]:
    """Yield what to change, by the shares of the step."""
    train = config.train
    llm = config.llm
    waiting = profile.seconds["waiting for data"] / profile.step
    if waiting > MUCH_WAITING:
        yield f"a step waits {waiting:.0%} of its time for data: train.stream.workers={train.stream.workers + 1}"
    if profile.padding > MUCH_PADDING and not train.tokens_per_batch:
        budget = round(profile.tokens)
        yield f"{profile.padding:.0%} is padding: train.tokens_per_batch={budget} fills steps by tokens, not by samples"
    rules: list[tuple[bool, str]] = [
        (
            llm.gradient_checkpointing,
            "blocks are recomputed, a third of the time: `rarec plan` says if llm.gradient_checkpointing=false fits",
        ),
        (
            device == "cpu" and llm.dtype == "float32" and _has_bfloat16(),
            "this processor multiplies bfloat16: llm.dtype=bfloat16 (it changes the model; make the shards again)",
        ),
        (
            device == "cuda" and not llm.compile,
            "llm.compile=true compiles the blocks, for trainings of more than some hundred steps",
        ),
    ]
    yield from (text for holds, text in rules if holds)
    if profile.of_bare >= FAR:
        yield f"the step has {profile.of_bare:.0%} of the bare model's speed: only another model or device is faster"


def _has_bfloat16() -> bool:
    capabilities: Callable[[], Any] = torch.cpu.get_capabilities
    return bool(capabilities().get("avx512_bf16") or capabilities().get("amx_bf16"))
