"""Measure the activation memory of a step: run the step on the meta device and count the bytes that it allocates.

The figures are what the layers really save, for any architecture, and they follow the code of the model, the towers and
the losses. For a Llama under `sdpa`, whose heads make up D, a block saves for each position

    16 D + 6 F + 2 T + 4 H + 8 bytes in bfloat16,  24 D + 12 F + 4 T + 4 H + 8 in float32:

the inputs of its 2 norms, in float32 (8 D), with a scale (4 each); queries, keys and values repeated for every head,
and the output (4 times D numbers); gate, its activation and up (3 F); the cast mask (T); attention's log-sums (4 H, of
positions filled up to a multiple of 32), and 16 bytes for each tower. A frozen linear layer saves its weight alone.
With gradient checkpointing a block saves its input alone (D), and one block at a time is recomputed. Beside the blocks:
slots (L, B, K, D) and projections in float32, text-only states of both sides with the gathered ones, scores (b, B), and
temporary tensors of the backward pass.

Shape letters: b rows of this rank, B rows of the whole batch, T positions, K slots, E source dimension, H history or
heads, L blocks, D hidden size, F size of the feed-forward layer.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rarec.config.method import Loss
from rarec.distributed.world import World
from rarec.models.losses import LossTargets, Objective
from rarec.models.towers import RaRec, SideBatch, Tower
from rarec.planning.meta_model import META, MetaModel

HISTORY = 50
"""Items in the longest history of a batch, for the mask of false negatives."""


@dataclass(frozen=True)
class StepShape:
    """Sizes of one micro-batch.

    Attributes:
        rows: samples of this rank, b.
        total: samples of all ranks, B.
        world_size: number of ranks that share the batch.
        text: tokens of the longest prompt of each side, without slots.
        state_blocks: blocks whose text-only states are stored.
        vectors: for each source, the number of vectors of a user and their dimension.
    """

    rows: int
    total: int
    world_size: int
    text: Mapping[str, int]
    state_blocks: tuple[int, ...]
    vectors: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch on one rank.

    Attributes:
        saved: bytes that wait for the backward pass, after the forward pass and the loss.
        peak: most bytes at once in the forward and backward pass.
        gathered: bytes of all ranks together in all-gathers.
        returned: those of `gathered` whose gradients are sent back.
    """

    saved: int
    peak: int
    gathered: int
    returned: int


class MemoryTracker(TorchDispatchMode):
    """Count the bytes that operations allocate inside this context, until they are freed.

    Args:
        held: tensors from before, which are not counted.

    Attributes:
        current: bytes allocated now.
        peak: most bytes allocated at once.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = [tensor.untyped_storage() for tensor in held]  # kept alive, so that no address is used again
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._held}
        self.current = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and count the storages that it returns; a question about values is answered False."""
        if func is torch.ops.aten._local_scalar_dense.default:  # for example, whether nothing is padded
            return False
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.current += size
            self.peak = max(self.peak, self.current)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.current -= size


@dataclass(frozen=True)
class MetaWorld(World):
    """A world of ranks without communication: it allocates what an exchange would, and counts the bytes.

    Attributes:
        exchanged: bytes of all ranks together, by the fields of `Activations`.
    """

    exchanged: dict[str, int] = field(default_factory=lambda: {"gathered": 0, "returned": 0})

    def gather_rows(self, rows_b: Tensor, total: int) -> Tensor:
        """See `World`."""
        whole = super().gather_rows(rows_b, total)
        size = whole.numel() * whole.element_size() * (self.size > 1)
        self.exchanged["gathered"] += size
        self.exchanged["returned"] += size * whole.requires_grad
        return whole

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See `World`."""
        return [torch.empty_like(tensor) for _ in range(self.size)]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """See `World`."""
        return tensor.detach().clone()


def step_activations(variant: MetaModel, loss: Loss, shape: StepShape) -> Activations:
    """Measure the forward pass, loss and backward pass of both towers.

    Gradients of trainable parameters exist from the start, as after the first of several micro-batches; they are
    counted elsewhere.
    """
    model = variant.model.train()
    world = MetaWorld(0, shape.world_size, META)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    objective = Objective(loss, torch.ones(1), shape.state_blocks, world)
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in trainable if p.grad is not None)]
    with META, MemoryTracker(held) as memory:
        sides = {side: _side_batch(tower, side, shape, shape.rows) for side, tower in _towers(model)}
        targets = _targets(shape, model.backbone.hidden_size)
        encoded = model(sides)
        total = objective(model, encoded["user"], encoded["item"], targets).total
        saved = memory.current
        if total.requires_grad:
            torch.autograd.backward(total)
    return Activations(saved, memory.peak, **world.exchanged)


@torch.no_grad()
def encoding_peak(variant: MetaModel, shape: StepShape, batch: int) -> int:
    """Return the most bytes at once while `batch` users or items are encoded, as in every validation."""
    model = variant.model.eval()
    peaks = list[int]()
    for side, tower in _towers(model):
        with META, MemoryTracker([*model.parameters(), *model.buffers()]) as memory:
            model({side: _side_batch(tower, side, shape, batch)})
        peaks.append(memory.peak)
    return max(peaks)


def _towers(model: RaRec) -> tuple[tuple[str, Tower], ...]:
    return ("user", model.user), ("item", model.item)


def _side_batch(tower: Tower, side: str, shape: StepShape, rows: int) -> SideBatch:
    slots = sum(tower.slots.values())
    ids_BT = torch.empty(rows, shape.text[side] + slots, dtype=torch.long)
    vectors = {n: torch.empty(rows, k if side == "user" else 1, e) for n, (k, e) in shape.vectors.items()}
    named = () if tower.alignment is None else tower.alignment.named_sources()  # those at titles, too
    vectors |= {name: torch.empty(rows, source.shape.vectors, source.shape.dim) for name, source in named}
    return SideBatch(ids_BT, torch.empty_like(ids_BT), torch.empty(rows, slots, dtype=torch.long), vectors)


def _targets(shape: StepShape, hidden: int) -> LossTargets:
    rows_b, histories_bH = (torch.empty(shape.rows, *more, dtype=torch.long) for more in ((), (HISTORY,)))
    users_bLD, items_bLD = (torch.empty(shape.rows, len(shape.state_blocks), hidden) for _ in range(2))
    return LossTargets(rows_b, rows_b.clone(), histories_bH, users_bLD, items_bLD, shape.total)
