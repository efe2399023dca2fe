"""Measure where the time of a training step goes, beside the bare language model, and advise what to change."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rarec.config import RunConfig
from rarec.distributed.hardware import has_bfloat16
from rarec.training.batches import Batch
from rarec.training.loop import Trainer

PHASES = ("waiting for data", "forward", "losses", "backward", "update")
WARM_UP = 2
"""Steps that are not counted: the allocator, the workers and the processor's caches are cold."""
MUCH_WAITING, MUCH_PADDING = 0.05, 0.2
"""Shares of waiting and padding beyond which something is advised."""


@dataclass(frozen=True)
class StepProfile:
    """What was measured of a variant's steps; medians.

    Attributes:
        seconds: of each phase of a step.
        tokens: text and slots of a step, without padding, on this process.
        padding: share of the positions that are padding.
        bare: seconds that the frozen model takes for as many tokens without padding, forward and backward.
    """

    seconds: dict[str, float]
    tokens: float
    padding: float
    bare: float

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

    def advice(self, config: RunConfig, device: str) -> Iterator[str]:
        """Yield what to change, most useful first.

        Args:
            config: of the run.
            device: type of the device.
        """
        train, llm = config.train, config.llm
        waiting = self.seconds[PHASES[0]] / self.step
        if waiting > MUCH_WAITING:
            more = train.stream.workers + 1
            yield f"a step waits {waiting:.0%} of its time for data: train.stream.workers={more}"
        if self.padding > MUCH_PADDING and not train.tokens_per_batch:
            budget = f"train.tokens_per_batch={self.tokens:.0f}"
            yield f"{self.padding:.0%} is padding: {budget} fills steps by tokens, not by samples"
        if llm.gradient_checkpointing:
            yield "recomputing blocks costs a third: `rarec plan` says if llm.gradient_checkpointing=false fits"
        if device == "cpu" and llm.dtype == "float32" and has_bfloat16():
            yield "this processor multiplies bfloat16: llm.dtype=bfloat16 (another model: make the shards again)"
        if device == "cuda" and not llm.compile:
            yield "llm.compile=true compiles the blocks, for trainings of more than some hundred steps"


def bench(trainer: Trainer, steps: int) -> StepProfile:
    """Take some steps of a training from its first weights on, and measure them; nothing is written.

    With `train.accumulate`, what counts as a step here is one of its parts, and an update.

    Args:
        trainer: of the variant.
        steps: number of steps that are counted.
    """
    spent: dict[str, list[float]] = {name: [] for name in PHASES}
    trainer.model.train()
    with trainer.loader.open(0, steps + WARM_UP) as loaded:
        batches = [_step(trainer, loaded, spent) for _ in range(steps + WARM_UP)]
    bare = [_bare_seconds(trainer, batch) for batch in batches]
    trainer.optimisation.end()
    tokens = [batch.tokens for batch in batches[WARM_UP:]]
    seconds = {name: statistics.median(times[WARM_UP:]) for name, times in spent.items()}
    padding = 1 - sum(tokens) / sum(batch.positions for batch in batches[WARM_UP:])
    return StepProfile(seconds, statistics.median(tokens), padding, statistics.median(bare[WARM_UP:]))


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


def _bare_seconds(trainer: Trainer, batch: Batch) -> float:
    """Return the seconds of the frozen model, forward and backward, on as many tokens without padding."""
    trunk: Any = trainer.model.backbone.trunk
    started = _now(trainer)
    for side in (batch.users, batch.items):
        length = max(1, round(float(side.mask_BT.sum()) / len(side.mask_BT)))
        embedded = trunk.get_input_embeddings()(side.ids_BT[:, :length]).detach().requires_grad_()
        trunk(inputs_embeds=embedded).last_hidden_state.float().mean().backward()
    return _now(trainer) - started


def _now(trainer: Trainer) -> float:
    """Return the time once the device has done what it was given."""
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
