"""Add up the memory of one rank for each engine, as `rarec.training.engines` allocates it.

P is the size of the trainable parameters in float32, N the number of ranks.

| | frozen weights | trainable | gradients | Adam | buckets |
| --- | --- | --- | --- | --- | --- |
| one process, DDP | whole | P | P | 2 P | DDP's: P |
| ZeRO-1 | whole | P | P | 3 P / N, with its own copy of the weights | one |
| ZeRO-2 | whole | P | P / N | 3 P / N | one |
| ZeRO-3 | each tensor / N, small ones whole as well | P / N | P / N | 3 P / N | one |
| FSDP2 | each tensor / N by rows | P | P | 2 P | |

Gathered weights, at their peak: FSDP2 holds the language model's weights outside the blocks (its embeddings), one
block, and the next one or its message. ZeRO-3 prefetches up to `live` elements; where blocks are not recomputed,
PyTorch saves each gathered matrix of a linear layer for the backward pass, once for each tower, and DeepSpeed cannot
free it (it could with `memory_efficient_linear`, which saves the layers' inputs instead).

The peaks of training, of encoding in a validation, and of the update or a checkpoint do not coincide: the highest
counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rarec.planning.cluster import REPLICATED, EngineName
from rarec.planning.meta_model import MetaModel, Weight

TOWERS = 2
_FLOAT = 4


@dataclass(frozen=True)
class ZeroSettings:
    """The fields of DeepSpeed's configuration that decide on memory, in elements.

    Attributes:
        bucket: `reduce_bucket_size` of each ZeRO stage.
        live: `stage3_max_live_parameters`, and `stage3_max_reuse_distance`, which has the same effect.
        persistent: `stage3_param_persistence_threshold`: tensors up to this size are kept whole beside their shards.
    """

    bucket: Mapping[EngineName, int]
    live: int = 1_000_000_000
    persistent: int = 100_000


SHIPPED_ZERO = ZeroSettings({"1": 50_000_000, "2": 50_000_000, "3": 50_000_000})
"""The values of `configs/deepspeed/`."""


@dataclass(frozen=True)
class ActivationPeaks:
    """Peak bytes of activations, the same for every engine.

    Attributes:
        training: in the forward and backward pass.
        encoding: while a chunk is encoded in a validation.
        checkpointing: whether blocks are recomputed in the backward pass.
    """

    training: int
    encoding: int
    checkpointing: bool


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
        activations: peak of the forward and backward pass; from here on, memory is temporary.
        gathered: peak of weights gathered from other ranks.
        encoding: peak of encoding in a validation.
        update: peak of the optimizer's update, or of writing a checkpoint.
    """

    frozen: int
    buffers: int
    trainable: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    gathered: int
    encoding: int
    update: int

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


def rank_memory(
    variant: MetaModel, engine: EngineName, world_size: int, peaks: ActivationPeaks, zero: ZeroSettings = SHIPPED_ZERO
) -> RankMemory:
    """Return the memory of one rank while a variant is trained."""
    whole = sum(weight.nbytes for weight in variant.trainable)
    share = sum(_share(weight, world_size) for weight in variant.trainable)
    bucket = zero.bucket.get(engine, 0) * _FLOAT
    gathered = _gathered(variant, engine, peaks, zero)
    temporary = {"activations": peaks.training, "gathered": gathered, "encoding": peaks.encoding}
    if engine in ("0", "fsdp2"):
        buckets = whole if engine == "0" and world_size > 1 else 0
        frozen = sum(w.nbytes if engine == "0" else _fsdp_share(w, world_size) for w in variant.frozen)
        held = {"trainable": whole, "gradients": whole, "optimizer": 2 * whole, "buckets": buckets}
        return RankMemory(frozen, variant.buffer_bytes, **held, **temporary, update=whole)
    trainable = {"1": whole, "2": whole, "3": share}[engine]
    gradients = {"1": whole, "2": share, "3": share}[engine]
    frozen = sum(w.nbytes if engine != "3" else _zero_share(w, world_size, zero) for w in variant.frozen)
    held = {"trainable": trainable, "gradients": gradients, "optimizer": 3 * share, "buckets": bucket}
    # a checkpoint gathers weights and moments
    return RankMemory(frozen, variant.buffer_bytes, **held, **temporary, update=3 * whole)


def _share(weight: Weight, world_size: int) -> int:
    return round(-(-weight.numel // world_size) * weight.element_bytes)


def _zero_share(weight: Weight, world_size: int, zero: ZeroSettings) -> int:
    return _share(weight, world_size) + (weight.nbytes if weight.numel <= zero.persistent else 0)


def _fsdp_share(weight: Weight, world_size: int) -> int:
    """Return the bytes of a shard by rows; the last ranks' shards are padded."""
    if not weight.in_llm:
        return weight.nbytes
    rows = -(-weight.shape[0] // world_size)
    return round(rows * weight.numel / weight.shape[0] * weight.element_bytes)


def _gathered(variant: MetaModel, engine: EngineName, peaks: ActivationPeaks, zero: ZeroSettings) -> int:
    if engine in REPLICATED:
        return _largest_unpacked(variant)
    return _gathered_by_fsdp2(variant) if engine == "fsdp2" else _gathered_by_zero3(variant, peaks, zero)


def _gathered_by_fsdp2(variant: MetaModel) -> int:
    blocks: dict[int | None, int] = {}
    for weight in variant.frozen:
        if weight.in_llm:
            blocks[weight.block] = blocks.get(weight.block, 0) + weight.nbytes
    outside = blocks.pop(None, 0)
    return outside + 2 * max(blocks.values())


def _gathered_by_zero3(variant: MetaModel, peaks: ActivationPeaks, zero: ZeroSettings) -> int:
    sharded = [w for w in variant.weights if w.numel > zero.persistent and (w.in_llm or w.trainable)]
    total, largest = sum(w.nbytes for w in sharded), max((w.nbytes for w in sharded), default=0)
    numel = sum(w.numel for w in sharded)
    if numel <= zero.live:
        return total + largest
    return max(round(zero.live * total / numel) + largest, _saved_matrices(variant, peaks) + largest)


def _saved_matrices(variant: MetaModel, peaks: ActivationPeaks) -> int:
    """Return the bytes of gathered matrices that wait for the backward pass, of both towers."""
    first = variant.first_grad_block
    if first is None or peaks.checkpointing:
        return 0
    return TOWERS * sum(w.nbytes for w in variant.frozen if w.linear and w.block is not None and w.block >= first)


def _largest_unpacked(variant: MetaModel) -> int:
    """Return the bytes of the largest 4-bit matrix while it is dequantized; 0 without quantization."""
    if not variant.nf4:
        return 0
    wide = max(weight.element_bytes for weight in variant.frozen if weight.in_llm)
    return round(wide * max(weight.numel for weight in variant.frozen if weight.linear and weight.in_llm))
