"""Estimate the bytes that a rank sends in a step, and the seconds that a step takes.

With rings, which all libraries use for large messages, an all-gather or a reduce-scatter of S bytes sends (N - 1) / N S
from each rank, and an all-reduce twice that. P is the size of the trainable parameters in float32.

- Gradients: DDP, ZeRO-1 and FSDP2 all-reduce P once in a step, ZeRO-2 in every micro-batch, ZeRO-3 scatters it in every
  micro-batch. DeepSpeed's ZeRO-1 and 2 gather the new P, and all-reduce every gradient once more for the log of their
  norms; ZeRO-3 gathers it for that, and, as all weights, both ways in every micro-batch.
- Weights: shards are gathered by both towers, forward and, in the blocks, backward. Under ZeRO-3 a block that is
  recomputed is gathered once more.
- Batch: item vectors and text-only states of all ranks, as the losses need them; item vectors' gradients are sent back.

Computing time is an estimate: `MFU` of the device's peak at 4 operations per weight and token (forward 2, gradients of
the inputs 2; frozen weights have no gradients), 6 where blocks are recomputed, 2 where no gradient reaches the language
model. Weights are gathered during computation; other messages are not overlapped. Reading data and validation are left
out.
"""

from dataclasses import dataclass

from rarec.distributed.hardware import NETWORK_GB_S, Device
from rarec.planning.activations import Activations
from rarec.planning.cluster import REPLICATED, EngineName
from rarec.planning.meta_model import MetaModel

MFU = 0.4
"""As published for LoRA on 7 to 8B models at 4,096 tokens, bfloat16, H100: 41 to 43% (NVIDIA NeMo AutoModel). Models
below a billion weights and small batches reach less."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, by purpose."""

    gradients: int
    weights: int
    batch: int

    @property
    def total(self) -> int:
        """The sum of all three."""
        return self.gradients + self.weights + self.batch


@dataclass(frozen=True)
class StepTime:
    """Duration and throughput of a step.

    Attributes:
        seconds: duration.
        tokens_per_s: tokens of one device in a second: text, slots and padding of both sides.
        samples_per_s: samples of all devices in a second.
    """

    seconds: float
    tokens_per_s: float
    samples_per_s: float


def step_traffic(
    variant: MetaModel, engine: EngineName, world_size: int, micro_batches: int, step: Activations, checkpointing: bool
) -> Traffic:
    """Return the bytes that one rank sends in a step of several micro-batches."""
    away = (world_size - 1) / world_size
    trainable = sum(weight.nbytes for weight in variant.trainable)
    times = {"0": 2, "1": 5, "2": 3 + 2 * micro_batches, "3": 1 + 3 * micro_batches, "fsdp2": 2}[engine]
    batch = (step.gathered + 2 * step.returned) * micro_batches
    weights = 0 if engine in REPLICATED else _gathered_bytes(variant, engine, checkpointing) * micro_batches
    return Traffic(round(times * trainable * away), round(weights * away), round(batch * away))


def step_time(
    variant: MetaModel,
    traffic: Traffic,
    device: Device,
    *,
    tokens: float,
    samples: float,
    checkpointing: bool,
    machines: int,
) -> StepTime:
    """Estimate the duration of a step.

    Args:
        variant: model of the variant.
        traffic: bytes that a rank sends in a step.
        device: kind of GPU.
        tokens: tokens of a rank in a step, of both sides, with slots and padding.
        samples: samples of all ranks in a step.
        checkpointing: whether blocks are recomputed in the backward pass.
        machines: number of machines; with several, all messages are as slow as the network.
    """
    factor = 2 if variant.first_grad_block is None else 6 if checkpointing else 4
    computing = factor * variant.block_numel * tokens / (MFU * device.tflops * 1e12)
    per_second = (device.link_gb_s if machines == 1 else min(device.link_gb_s, NETWORK_GB_S)) * 1e9
    seconds = max(computing, traffic.weights / per_second) + (traffic.gradients + traffic.batch) / per_second
    return StepTime(seconds, tokens / seconds, samples / seconds)


def _gathered_bytes(variant: MetaModel, engine: EngineName, checkpointing: bool) -> int:
    """Return the bytes of weights that all ranks together gather in a micro-batch."""
    llm = [weight for weight in variant.frozen if weight.in_llm]
    first = variant.first_grad_block
    backward = [w for w in llm if first is not None and w.block is not None and w.block >= first]
    times = 2 if engine == "3" and checkpointing else 1
    return 2 * sum(weight.nbytes for weight in llm) + 2 * times * sum(weight.nbytes for weight in backward)
