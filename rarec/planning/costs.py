"""Add up what one rank holds, sends and takes in a step, for each engine, as `rarec.training.engines` does it.

Memory. P is the size of the trainable parameters in float32, N the number of ranks.

| | frozen weights | trainable | gradients | Adam | buckets |
| --- | --- | --- | --- | --- | --- |
| one process, DDP | whole | P | P | 2 P | DDP's: P |
| ZeRO-1 | whole | P | P | 3 P / N, with its own copy of the weights | one |
| ZeRO-2 | whole | P | P / N | 3 P / N | one |
| ZeRO-3 | each tensor / N, small ones whole as well | P / N | P / N | 3 P / N | one |
| FSDP2 | each tensor / N by rows | P | P | 2 P | DDP's: P |

Gathered weights, at their peak: FSDP2 holds the language model's weights outside the blocks (its embeddings), one
block, and the next one or its message. ZeRO-3 prefetches up to `live` elements; where blocks are not recomputed,
PyTorch saves each gathered matrix of a linear layer for the backward pass, once for each tower, and DeepSpeed cannot
free it (it could with `memory_efficient_linear`, which saves the layers' inputs instead).

The peaks of training, of encoding in a validation, and of the update or a checkpoint do not coincide: the highest
counts.

Traffic. With rings, which all libraries use for large messages, an all-gather or a reduce-scatter of S bytes sends
(N - 1) / N S from each rank, and an all-reduce twice that.

- Gradients: DDP, ZeRO-1 and FSDP2 all-reduce P once in a step, ZeRO-2 in every micro-batch, ZeRO-3 scatters it in every
  micro-batch. DeepSpeed's ZeRO-1 and 2 gather the new P, and all-reduce every gradient once more for the log of their
  norms; ZeRO-3 gathers it for that, and, as all weights, both ways in every micro-batch.
- Weights: shards are gathered by both towers, forward and, in the blocks, backward. Under ZeRO-3 a block that is
  recomputed is gathered once more.
- Batch: item vectors and text-only states of all ranks, as the losses need them; item vectors' gradients are sent back.

Time. Computing is estimated at `MFU` of the device's peak and 4 operations per weight and token (forward 2, gradients
of the inputs 2; frozen weights have no gradients), 6 where blocks are recomputed, 2 where no gradient reaches the
language model. Weights are gathered during computation; other messages are not overlapped. Reading data and validation
are left out.
"""

from collections import Counter
from dataclasses import dataclass

from rarec.distributed.hardware import NETWORK_GB_S
from rarec.planning.activations import Activations
from rarec.planning.meta_model import MetaModel, Weight
from rarec.planning.setup import REPLICATED, Cluster, EngineName

TOWERS = 2
_FLOAT = 4
MFU = 0.4
"""As published for LoRA on 7 to 8B models at 4,096 tokens, bfloat16, H100: 41 to 43% (NVIDIA NeMo AutoModel). Models
below a billion weights and small batches reach less."""


@dataclass(frozen=True)
class ZeroSettings:
    """The fields of DeepSpeed's configuration that decide on memory, in elements; by default those of its files here.

    Attributes:
        bucket: `reduce_bucket_size`.
        live: `stage3_max_live_parameters`, and `stage3_max_reuse_distance`, which has the same effect.
        persistent: `stage3_param_persistence_threshold`: tensors up to this size are kept whole beside their shards.
    """

    bucket: int = 50_000_000
    live: int = 1_000_000_000
    persistent: int = 100_000


SHIPPED_ZERO = ZeroSettings()
"""The values of `configs/deepspeed/`."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank.

    Attributes:
        frozen: frozen weights.
        buffers: whitening, and scales of the blocks.
        trainable: trainable parameters.
        gradients: gradients of trainable parameters.
        optimizer: states of Adam.
        buckets: buffers for communication.
        gathered: peak of weights gathered from other ranks; from here on, memory is temporary.
        update: peak of the optimizer's update, or of writing a checkpoint.
        activations: peak of the forward and backward pass.
        encoding: peak of encoding in a validation.
    """

    frozen: int
    buffers: int
    trainable: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    update: int
    activations: int = 0
    encoding: int = 0

    @property
    def static(self) -> int:
        """The bytes that are allocated throughout the training."""
        return self.frozen + self.buffers + self.trainable + self.gradients + self.optimizer + self.buckets

    @property
    def phases(self) -> dict[str, int]:
        """The temporary bytes of each phase."""
        gathered = self.gathered
        return {"training": self.activations + gathered, "encoding": self.encoding + gathered, "update": self.update}

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return self.static + max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def rank_memory(model: MetaModel, engine: EngineName, world_size: int, zero: ZeroSettings = SHIPPED_ZERO) -> RankMemory:
    """Return the memory of one rank while a variant is trained, without activations.

    Args:
        model: model of the variant.
        engine: engine to train with.
        world_size: number of ranks.
        zero: DeepSpeed's settings.
    """
    whole = _bytes(model.trainable)
    share = sum(_share(weight, world_size) for weight in model.trainable)
    deepspeed = engine in ("1", "2", "3")
    ddp_bucket = whole if world_size > 1 else 0
    return RankMemory(
        frozen=sum(_frozen_bytes(weight, engine, world_size, zero) for weight in model.frozen),
        buffers=model.buffer_bytes,
        trainable=share if engine == "3" else whole,
        gradients=share if engine in ("2", "3") else whole,
        optimizer=3 * share if deepspeed else 2 * whole,
        buckets=zero.bucket * _FLOAT if deepspeed else ddp_bucket,
        gathered=_gathered_peak(model, engine, zero),
        update=3 * whole if deepspeed else whole,  # DeepSpeed's checkpoint gathers weights and moments
    )


def _bytes(weights: list[Weight]) -> int:
    return sum(weight.nbytes for weight in weights)


def _share(weight: Weight, world_size: int) -> int:
    return round(-(-weight.numel // world_size) * weight.element_bytes)


def _frozen_bytes(weight: Weight, engine: EngineName, world_size: int, zero: ZeroSettings) -> int:
    """Return the bytes of a frozen weight on one rank; FSDP2 pads the last ranks' shards."""
    if engine == "3":
        return _share(weight, world_size) + (weight.nbytes if weight.numel <= zero.persistent else 0)
    if engine == "fsdp2" and weight.in_llm:
        rows = -(-weight.shape[0] // world_size)
        return round(rows * weight.numel / weight.shape[0] * weight.element_bytes)
    return weight.nbytes


def _gathered_peak(model: MetaModel, engine: EngineName, zero: ZeroSettings) -> int:
    """Return the most bytes of weights that are gathered, or unpacked from 4 bits, at once."""
    if engine == "3":
        return _gathered_by_zero3(model, zero)
    if engine == "fsdp2":
        by_block = Counter[int | None]()
        for weight in model.frozen:
            by_block[weight.block] += weight.nbytes if weight.in_llm else 0
        return by_block.pop(None, 0) + 2 * max(by_block.values())
    if not model.nf4:
        return 0
    wide = max(weight.element_bytes for weight in model.frozen if weight.in_llm)
    return round(wide * max(weight.numel for weight in model.frozen if weight.linear and weight.in_llm))


def _gathered_by_zero3(model: MetaModel, zero: ZeroSettings) -> int:
    sharded = [w for w in model.weights if w.numel > zero.persistent and (w.in_llm or w.trainable)]
    total = _bytes(sharded)
    largest = max((weight.nbytes for weight in sharded), default=0)
    numel = sum(weight.numel for weight in sharded)
    if numel <= zero.live:
        return total + largest
    saved = 0 if model.recomputes else TOWERS * _bytes([weight for weight in model.grad_path if weight.linear])
    return largest + max(round(zero.live * total / numel), saved)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, by purpose."""

    gradients: int
    weights: int
    batch: int


def step_traffic(
    model: MetaModel, engine: EngineName, world_size: int, micro_batches: int, step: Activations
) -> Traffic:
    """Return the bytes that one rank sends in a step of several micro-batches."""
    away = (world_size - 1) / world_size
    times = {"0": 2, "1": 5, "2": 3 + 2 * micro_batches, "3": 1 + 3 * micro_batches, "fsdp2": 2}[engine]
    batch = (step.gathered + 2 * step.returned) * micro_batches
    gathered = 0
    if engine not in REPLICATED:  # by both towers: forward, and backward once or twice
        backward = 2 if engine == "3" and model.recomputes else 1
        llm = [weight for weight in model.frozen if weight.in_llm]
        gathered = TOWERS * (_bytes(llm) + backward * _bytes(model.grad_path)) * micro_batches
    return Traffic(round(times * _bytes(model.trainable) * away), round(gathered * away), round(batch * away))


def step_seconds(model: MetaModel, traffic: Traffic, cluster: Cluster, tokens: float) -> float:
    """Estimate the duration of a step.

    Args:
        model: model of the variant.
        traffic: bytes that a rank sends in a step.
        cluster: GPUs to train on; with several machines, all messages are as slow as the network.
        tokens: tokens of a rank in a step, of both sides, with slots and padding.
    """
    device = cluster.device
    factor = 2 if model.first_grad_block is None else 6 if model.recomputes else 4
    computing = factor * model.block_numel * tokens / (MFU * device.tflops * 1e12)
    per_second = (device.link_gb_s if cluster.machines == 1 else min(device.link_gb_s, NETWORK_GB_S)) * 1e9
    return max(computing, traffic.weights / per_second) + (traffic.gradients + traffic.batch) / per_second
