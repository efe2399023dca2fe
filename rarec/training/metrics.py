"""What an operator watches: speed, how much of it is of use, memory, losses and gradients, over all ranks."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rarec.hardware import known_device, peak_memory
from rarec.models.build import whole_size
from rarec.models.losses import LossTerms
from rarec.models.towers import RaRec
from rarec.training.batches import Batch
from rarec.world import World


@dataclass
class Step:
    """One rank's account of one step, part by part.

    Attributes:
        started: on this machine's clock.
        waited: seconds for data.
        tokens: text and slots of both sides.
        padded: the same with the padding.
        keys: of the samples.
    """

    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    tokens: int = 0
    padded: int = 0
    keys: list[str] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def add(self, batch: Batch, losses: LossTerms) -> None:
        """A part of the step."""
        self.tokens += batch.tokens
        self.padded += batch.users.mask_BT.numel() + batch.items.mask_BT.numel()
        self.keys += batch.keys
        self.losses.append(torch.stack([losses.total, losses.recommendation, losses.align]).detach().double())

    def over(self, world: World, stopping: bool) -> "StepOfAll":
        """Of all ranks together; one exchange.

        Args:
            world: all of them.
            stopping: whether this rank has been told to stop.
        """
        losses_3 = torch.stack(self.losses).mean(0)
        own_5 = losses_3.new_tensor([self.tokens, self.padded, self.waited, float(stopping), len(self.keys)])
        total_8 = world.all_reduce_sum(torch.cat([losses_3, own_5]).to(world.device))
        loss, recommendation, align, *sums, samples = total_8.tolist()
        tokens, padded, waited, stops = (each / world.size for each in sums)
        return StepOfAll(loss, recommendation, align, tokens, padded, waited, stops > 0, round(samples))


@dataclass(frozen=True)
class StepOfAll:
    """One step over all ranks.

    Attributes:
        loss: what is minimised.
        recommendation: its first term.
        align: its second, before weighting.
        tokens: of a rank, their mean: text and slots of both sides.
        padded: the same with the padding.
        waited: seconds for data.
        stops: whether a rank has been told to stop.
        samples: of all ranks.
        seconds: that the step took, update and all; ranks end it together.
    """

    loss: float
    recommendation: float
    align: float
    tokens: float
    padded: float
    waited: float
    stops: bool
    samples: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Of one device."""
        return self.tokens / self.seconds

    def figures(self, norms: Mapping[str, float]) -> dict[str, float]:
        """For the log; shares of time and of positions, gradient norms by group before clipping."""
        groups = {f"gradient_norm/{group}": norm for group, norm in norms.items() if group != "all"}
        return {
            "loss": self.loss,
            "recommendation": self.recommendation,
            "align": self.align,
            "samples": self.samples,
            "tokens_per_s": self.tokens_per_s,
            "data_wait": self.waited / self.seconds,
            "padding": 1 - self.tokens / self.padded,
            "gradient_norm": norms.get("all", 0.0),
            **groups,
        }


@dataclass(frozen=True)
class Machine:
    """What a step's speed is held against.

    Attributes:
        flops_per_token: 4N for a model whose N weights are frozen: forward 2N, gradients of its inputs 2N.
        peak: operations a second of this device; None where it is not in the table.
        device: this rank's.
    """

    flops_per_token: float
    peak: float | None
    device: torch.device

    @classmethod
    def of(cls, model: RaRec, device: torch.device) -> "Machine":
        """Of a model on a device."""
        known = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return cls(
            4.0 * sum(map(whole_size, model.backbone.blocks.parameters())),
            known.tflops * 1e12 if known else None,
            device,
        )

    def figures(self, step: StepOfAll) -> dict[str, float]:
        """MFU where the device's peak is known, and the most memory that this rank has taken, in bytes."""
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
        mfu = {"mfu": step.tokens_per_s * self.flops_per_token / self.peak} if self.peak else {}
        return {**mfu, "memory": float(memory)}
