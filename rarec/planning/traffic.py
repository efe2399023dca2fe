"""Bytes that a rank sends in a step, and the time that computing and sending take.

With rings, which all libraries use for large messages, an all-gather or a reduce-scatter of S bytes sends (N - 1) / N S
from each rank, and an all-reduce twice that.

- Gradients: DDP, ZeRO-1 and FSDP2 all-reduce P once a step, ZeRO-2 in every part, ZeRO-3 scatters it in every part.
  DeepSpeed's ZeRO-1 and 2 gather the new P, and all-reduce every gradient once more for the log of their norms; ZeRO-3
  gathers it for that, and, as all weights, both ways in every part.
- Weights: sharded ones are gathered by both towers, forward and, in the blocks, backward. Under ZeRO-3 a block that is
  recomputed is gathered once more.
- Batch: item vectors and text-only states of all ranks, as the losses ask for them; item vectors' gradients come back.

Time is an estimate: computing at `MFU` of the device's peak on 4 operations a weight and token (forward 2, gradients of
the inputs 2; what is frozen has no others), 6 where blocks are recomputed, 2 where no gradient reaches the language
model. Weights are gathered while it computes; all else waits. Reading data and validating are not in it.
"""

from dataclasses import dataclass

from rarec.hardware import NETWORK_GB_S, Device
from rarec.planning.memory import REPLICATED, Stage
from rarec.planning.shapes import VariantShapes
from rarec.planning.step import Activations

MFU = 0.4
"""As published for LoRA on 7 to 8B models at 4,096 tokens, bfloat16, H100: 41 to 43% (NVIDIA NeMo AutoModel). Models of
less than a billion weights and small batches stay below."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step."""

    gradients: int
    weights: int
    batch: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.gradients + self.weights + self.batch


@dataclass(frozen=True)
class Speed:
    """Of a step.

    Attributes:
        seconds: it takes.
        tokens: text, slots and padding of both sides, each second, of one device.
        samples: each second, of all devices.
    """

    seconds: float
    tokens: float
    samples: float


def traffic(
    variant: VariantShapes, stage: Stage, ranks: int, parts: int, step: Activations, recomputes: bool
) -> Traffic:
    """What a step of so many parts sends."""
    away = (ranks - 1) / ranks
    trained = sum(weight.bytes for weight in variant.trained)
    reduced = {"0": 2, "1": 5, "2": 3 + 2 * parts, "3": 1 + 3 * parts, "fsdp2": 2}[stage] * trained
    batch = (step.gathered + 2 * step.returned) * parts
    weights = 0 if stage in REPLICATED else _gathers(variant, stage, recomputes) * parts
    return Traffic(round(reduced * away), round(weights * away), round(batch * away))


def speed(
    variant: VariantShapes,
    sent: Traffic,
    device: Device,
    *,
    tokens: float,
    samples: float,
    recomputes: bool,
    machines: int,
) -> Speed:
    """How fast a step is.

    Args:
        variant: its model.
        sent: in a step.
        device: that computes.
        tokens: that a rank has in a step, both sides, with slots and padding.
        samples: that all ranks have in a step.
        recomputes: whether blocks are.
        machines: over which the ranks are spread; with several, everything is as slow as the network.
    """
    factor = 2 if variant.first_block is None else 6 if recomputes else 4
    computing = factor * variant.in_blocks * tokens / (MFU * device.tflops * 1e12)
    per_second = (device.link_gb_s if machines == 1 else min(device.link_gb_s, NETWORK_GB_S)) * 1e9
    seconds = max(computing, sent.weights / per_second) + (sent.gradients + sent.batch) / per_second
    return Speed(seconds, tokens / seconds, samples / seconds)


def _gathers(variant: VariantShapes, stage: Stage, recomputes: bool) -> int:
    """Bytes that all ranks together gather in a part."""
    trunk = [weight for weight in variant.frozen if weight.in_trunk]
    first = variant.first_block
    backward = [w for w in trunk if first is not None and w.block is not None and w.block >= first]
    again = 2 if stage == "3" and recomputes else 1
    return 2 * sum(weight.bytes for weight in trunk) + 2 * again * sum(weight.bytes for weight in backward)
