"""What one rank holds, engine by engine, as `rarec.training.engines` lays it out; P is what trains, in float32.

| | frozen | P | gradients | Adam | beside |
| --- | --- | --- | --- | --- | --- |
| one process, DDP | whole | P | P | 2 P | DDP's buckets: P |
| ZeRO-1 | whole | P | P | 3 P / N, its own copy of the weights among it | one bucket |
| ZeRO-2 | whole | P | P / N | 3 P / N | one bucket |
| ZeRO-3 | each tensor / N, small ones whole as well | P / N | P / N | 3 P / N | one bucket |
| FSDP2 | each tensor / N by rows | P | P | 2 P | |

What is gathered for a while: FSDP2 keeps what the trunk has outside its blocks (its embeddings), one block, and the
next one or its message. ZeRO-3 fetches ahead until it has `live` elements; and where blocks are not recomputed, PyTorch
saves each gathered matrix of a linear layer for the backward pass, once for each tower, and DeepSpeed cannot free it
(it could with `memory_efficient_linear`, which saves the layers' inputs instead).

Peaks do not coincide: those of training, of encoding at a validation, and of the update or a checkpoint are compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from rarec.planning.shapes import VariantShapes, Weight

Stage = Literal["0", "1", "2", "3", "fsdp2"]
STAGES: tuple[Stage, ...] = get_args(Stage)
REPLICATED: tuple[Stage, ...] = ("0", "1", "2")
TOWERS = 2
_FLOAT = 4


@dataclass(frozen=True)
class ZeroSettings:
    """Of DeepSpeed's configuration what decides on memory, as `configs/deepspeed/` has it; numbers of elements.

    Attributes:
        bucket: `reduce_bucket_size` of each stage.
        live: `stage3_max_live_parameters`, and `stage3_max_reuse_distance`, which has the same effect.
        persistent: `stage3_param_persistence_threshold`: tensors up to it stay whole beside their shards.
    """

    bucket: Mapping[Stage, int]
    live: int = 1_000_000_000
    persistent: int = 100_000


SHIPPED = ZeroSettings({"1": 50_000_000, "2": 50_000_000, "3": 50_000_000})


@dataclass(frozen=True)
class Peaks:
    """Bytes that come and go, the same on every engine.

    Attributes:
        training: forward and backward.
        encoding: of a chunk at a validation.
        recomputes: whether blocks are.
    """

    training: int
    encoding: int
    recomputes: bool


@dataclass(frozen=True)
class Account:
    """Bytes on one rank. The first six stay; the others come and go."""

    frozen: int
    fixed: int
    trained: int
    gradients: int
    optimizer: int
    buckets: int
    training: int
    gathered: int
    encoding: int
    update: int

    @property
    def stays(self) -> int:
        """Through all of a training."""
        return self.frozen + self.fixed + self.trained + self.gradients + self.optimizer + self.buckets

    @property
    def phases(self) -> dict[str, int]:
        """What comes on top, by what the rank is doing."""
        gathers = self.gathered
        return {"training": self.training + gathers, "encoding": self.encoding + gathers, "update": self.update}

    @property
    def total(self) -> int:
        """At the highest of all."""
        return self.stays + max(self.phases.values())

    @property
    def highest(self) -> str:
        """The phase of it."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def account(variant: VariantShapes, stage: Stage, ranks: int, peaks: Peaks, zero: ZeroSettings = SHIPPED) -> Account:
    """What a rank holds while a variant trains."""
    whole = sum(weight.bytes for weight in variant.trained)
    share = sum(_share(weight, ranks) for weight in variant.trained)
    bucket = zero.bucket.get(stage, 0) * _FLOAT
    gathered = _gathered(variant, stage, ranks, peaks, zero)
    come_and_go = {"training": peaks.training, "gathered": gathered, "encoding": peaks.encoding}
    if stage in ("0", "fsdp2"):
        buckets = whole if stage == "0" and ranks > 1 else 0
        frozen = sum(w.bytes if stage == "0" else _fsdp_share(w, ranks) for w in variant.frozen)
        held = {"trained": whole, "gradients": whole, "optimizer": 2 * whole, "buckets": buckets}
        return Account(frozen, variant.fixed, **held, **come_and_go, update=whole)
    trained = {"1": whole, "2": whole, "3": share}[stage]
    gradients = {"1": whole, "2": share, "3": share}[stage]
    frozen = sum(w.bytes if stage != "3" else _zero_share(w, ranks, zero) for w in variant.frozen)
    held = {"trained": trained, "gradients": gradients, "optimizer": 3 * share, "buckets": bucket}
    # a checkpoint takes weights and moments whole
    return Account(frozen, variant.fixed, **held, **come_and_go, update=3 * whole)


def _share(weight: Weight, ranks: int) -> int:
    return round(-(-weight.count // ranks) * weight.width)


def _zero_share(weight: Weight, ranks: int, zero: ZeroSettings) -> int:
    return _share(weight, ranks) + (weight.bytes if weight.count <= zero.persistent else 0)


def _fsdp_share(weight: Weight, ranks: int) -> int:
    """By rows, the last ranks' filled up."""
    if not weight.in_trunk:
        return weight.bytes
    rows = -(-weight.shape[0] // ranks)
    return round(rows * weight.count / weight.shape[0] * weight.width)


def _gathered(variant: VariantShapes, stage: Stage, ranks: int, peaks: Peaks, zero: ZeroSettings) -> int:
    if stage in REPLICATED:
        return _unpacked(variant)
    blocks: dict[int | None, int] = {}
    for weight in variant.frozen:
        if weight.in_trunk:
            blocks[weight.block] = blocks.get(weight.block, 0) + weight.bytes
    outside = blocks.pop(None, 0)
    if stage == "fsdp2":
        return outside + 2 * max(blocks.values())
    sharded = [w for w in variant.weights if w.count > zero.persistent and (w.in_trunk or w.trains)]
    every, largest = sum(w.bytes for w in sharded), max((w.bytes for w in sharded), default=0)
    if sum(w.count for w in sharded) <= zero.live:
        return every + largest
    resident = round(zero.live * every / sum(w.count for w in sharded)) + largest
    return max(resident, _saved_matrices(variant, peaks) + largest)


def _saved_matrices(variant: VariantShapes, peaks: Peaks) -> int:
    """Gathered matrices that wait for the backward pass, of both towers."""
    first = variant.first_block
    if first is None or peaks.recomputes:
        return 0
    return TOWERS * sum(w.bytes for w in variant.frozen if w.linear and w.block is not None and w.block >= first)


def _unpacked(variant: VariantShapes) -> int:
    """The largest of the matrices in 4 bits, while it is used."""
    if not variant.nf4:
        return 0
    wide = max(weight.width for weight in variant.frozen if weight.in_trunk)
    return round(wide * max(weight.count for weight in variant.frozen if weight.linear and weight.in_trunk))
