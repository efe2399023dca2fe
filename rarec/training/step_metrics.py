"""The metrics of a training step over all ranks, and where they go: `log.jsonl`, trackers, the progress bar."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rarec.console.progress import Task
from rarec.distributed.hardware import known_device, peak_memory
from rarec.distributed.world import World
from rarec.models.build import whole_size
from rarec.models.losses import LossTerms
from rarec.models.towers import RaRec
from rarec.storage.files import read_lines, write_text
from rarec.training.batches import Batch

GROUPS = ("alignment", "lora_A", "lora_B", "heads")
"""Groups of parameters whose gradient norms are logged."""


@dataclass
class StepAccumulator:
    """The figures of one step on one rank, added up over its parts.

    Attributes:
        started: start of the step on this machine's clock.
        waited: seconds spent waiting for data.
        tokens: text and slots of both sides.
        padded: the same including padding.
        keys: keys of the samples.
        losses: for each part, the total loss and its three terms (4,).
    """

    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    tokens: int = 0
    padded: int = 0
    keys: list[str] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def add(self, batch: Batch, losses: LossTerms) -> None:
        """Add one part of the step."""
        self.tokens += batch.tokens
        self.padded += batch.positions
        self.keys += batch.keys
        self.losses.append(torch.stack(losses).detach().double())

    def reduce(self, world: World, stopping: bool) -> "StepMetrics":
        """Return the figures over all ranks, by one collective operation.

        Args:
            world: all ranks.
            stopping: whether this rank has received a signal to stop.
        """
        losses_4 = torch.stack(self.losses).mean(0)
        own_5 = losses_4.new_tensor([self.tokens, self.padded, self.waited, float(stopping), len(self.keys)])
        total_9 = world.all_reduce_sum(torch.cat([losses_4, own_5]).to(world.device))
        loss, recommendation, align, distil, *sums, samples = total_9.tolist()
        tokens, padded, waited, stops = (each / world.size for each in sums)
        return StepMetrics(loss, recommendation, align, distil, tokens, padded, waited, stops > 0, round(samples))


@dataclass(frozen=True)
class StepMetrics:
    """The figures of one step over all ranks.

    Attributes:
        loss: the loss that is minimised.
        recommendation: its first term.
        align: its second term, before weighting.
        distil: its third term, before weighting.
        tokens: text and slots of both sides, mean over the ranks.
        padded: the same including padding.
        waited: seconds spent waiting for data, mean over the ranks.
        stops: whether a rank has received a signal to stop.
        samples: number of samples on all ranks.
        seconds: duration of the step with its update; ranks end it together.
    """

    loss: float
    recommendation: float
    align: float
    distil: float
    tokens: float
    padded: float
    waited: float
    stops: bool
    samples: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second on one device."""
        return self.tokens / self.seconds

    def figures(self, norms: Mapping[str, float]) -> dict[str, float]:
        """Return the figures for the log.

        Args:
            norms: gradient norm of each group before clipping, and of all as `all`.
        """
        groups = {f"gradient_norm/{group}": norm for group, norm in norms.items() if group != "all"}
        return {
            **{name: getattr(self, name) for name in ("loss", "recommendation", "align", "distil", "samples")},
            "tokens_per_s": self.tokens_per_s,
            "data_wait": self.waited / self.seconds,
            "padding": 1 - self.tokens / self.padded,
            "gradient_norm": norms.get("all", 0.0),
            **groups,
        }


def group_of(name: str) -> str:
    """Return the group of a trainable parameter."""
    lora = next((group for group in GROUPS if group.startswith("lora") and group in name), None)
    return lora or ("alignment" if ".alignment." in name else "heads")


def norms(gradients: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Return the gradient norm of each group that has gradients, and of all together as `all`."""
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients:
        square = torch.linalg.vector_norm(gradient.detach()) ** 2
        for group in (group_of(name), "all"):
            squares[group] = squares[group] + square if group in squares else square
    return {group: float(square.sqrt()) for group, square in squares.items()}


@dataclass(frozen=True)
class DeviceMeter:
    """Measures the use of a device: model FLOPs utilisation (MFU) and memory.

    Attributes:
        flops_per_token: 4N for a model whose N weights are frozen: forward 2N, gradients of its inputs 2N.
        peak: FLOP/s of this device; None if the device is not known.
        device: this rank's device.
    """

    flops_per_token: float
    peak: float | None
    device: torch.device

    @classmethod
    def of(cls, model: RaRec, device: torch.device) -> "DeviceMeter":
        """Return the meter of a model on a device."""
        known = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        flops_per_token = 4.0 * sum(map(whole_size, model.backbone.blocks.parameters()))
        return cls(flops_per_token, known.tflops * 1e12 if known else None, device)

    def figures(self, step: StepMetrics) -> dict[str, float]:
        """Return the MFU, if the device's peak is known, and this rank's peak memory in bytes."""
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_memory()
        mfu = {"mfu": step.tokens_per_s * self.flops_per_token / self.peak} if self.peak else {}
        return {**mfu, "memory": float(memory)}


class TrainingLog:
    """Writes the records of one variant's training, on rank 0.

    Args:
        path: `log.jsonl`; records after the resumed step are dropped, because these steps run again.
        accelerator: holds the trackers; None on other ranks, which write nothing.
        steps: number of steps of the training.
        done: number of steps already done.
        title: label of the progress bar.
    """

    def __init__(self, path: Path, accelerator: Accelerator | None, steps: int, done: int, title: str) -> None:
        self._accelerator = accelerator
        if accelerator is None:
            return
        kept = [record for record in _complete_records(path) if record["step"] <= done]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")
        self._task = Task(title, steps, done)

    def record(self, step: int, **values: Any) -> None:
        """Write one record to the file and the trackers."""
        if self._accelerator is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        figures = {k: v for k, v in values.items() if isinstance(v, int | float)}
        figures |= values.get("validation", {})
        self._accelerator.log(figures, step=step)

    def step(self, step: int, **figures: float) -> None:
        """Record a step and show it."""
        self.record(step, **figures)
        if self._accelerator is not None:
            self._task.update(step, _facts(figures))

    def close(self) -> None:
        """Stop the bar and close the file."""
        if self._accelerator is not None:
            self._task.end()
            self._file.close()


def _facts(figures: Mapping[str, float]) -> str:
    """Return what is shown of a step: loss, speed, memory. All else is in the log."""
    speed, memory = figures["tokens_per_s"], figures["memory"] / 1e9
    tokens = f"{speed / 1e3:.0f}k" if speed >= 10_000 else f"{speed:.0f}"
    gigabytes = f"{memory:.0f}" if memory >= 10 else f"{memory:.1f}"
    return f"loss {figures['loss']:.3f}, {tokens} tokens/s, {gigabytes} GB"


def _complete_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete records of a log; a kill may have cut a line short."""
    for line in read_lines(path) if path.exists() else []:
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record
