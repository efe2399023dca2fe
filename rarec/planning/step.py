"""Activations of a step: the step itself, taken on the meta device, and the bytes that it has live at most.

So the figures are what the layers save, whatever the architecture, and they follow the code of the model, the towers
and the losses. For a Llama under `sdpa`, whose heads make up D, a block saves for each position

    16 D + 6 F + 2 T + 4 H + 8 bytes in bfloat16,  24 D + 12 F + 4 T + 4 H + 8 in float32:

what its 2 norms read, in float32 (8 D), with a scale (4 each); queries, keys and values repeated for every head, and
the output (4 numbers D); gate, its activation and up (3 F); the cast mask (T); attention's log-sums (4 H). A frozen
linear layer saves its weight alone. With gradient checkpointing a block keeps its input alone (D), and one block at a
time is made again. Beside the blocks: slots (L, B, K, D) and projections in float32, text-only states of both sides
with the gathered ones, scores (b, B), and what the backward pass has in flight.

Shape letters: b rows of this rank, B rows of the whole batch, T positions, K slots, E source dimension, H history or
heads, L blocks, D hidden size, F size of the feed-forward layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rarec.config.method import Loss
from rarec.models.losses import LossTargets, Objective
from rarec.models.towers import RaRec, SideBatch, Tower
from rarec.planning.live import Live
from rarec.planning.shapes import META, VariantShapes
from rarec.world import World

HISTORY = 50
"""Items in the longest history of a batch, for the mask of false negatives."""


@dataclass(frozen=True)
class StepShape:
    """One part of a step.

    Attributes:
        rows: b.
        total: B.
        ranks: that share it.
        text: longest prompt of each side, without slots.
        state_blocks: whose text-only states are stored.
        vectors: of each source, how many a user has, and their dimension.
    """

    rows: int
    total: int
    ranks: int
    text: Mapping[str, int]
    state_blocks: tuple[int, ...]
    vectors: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank.

    Attributes:
        saved: when the forward pass and the loss are done.
        peak: the most, while the backward pass goes.
        gathered: that all ranks together put into one all-gather after the other.
        returned: of them, what gradients come back for.
    """

    saved: int
    peak: int
    gathered: int
    returned: int


@dataclass(frozen=True)
class PlannedWorld(World):
    """Stands for this rank among its like: it allocates what an exchange would, and counts it.

    Attributes:
        exchanged: bytes of all ranks together, `gathered` and of them `returned` as gradients.
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


def step_activations(variant: VariantShapes, loss: Loss, shape: StepShape) -> Activations:
    """Forward, loss and backward of both towers.

    Gradients of what trains are there from the start, as behind the first of several parts; they are counted apart.
    """
    model, world = variant.model.train(), PlannedWorld(0, shape.ranks, META)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    objective = Objective(loss, torch.ones(1), shape.state_blocks, world)
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
    with META, Live(held) as live:
        sides = {side: _side(tower, side, shape, shape.rows) for side, tower in _towers(model)}
        targets = _targets(shape, model.backbone.hidden_size)
        encoded = model(sides)
        total = objective(model, encoded["user"], encoded["item"], targets).total
        saved = live.now
        if total.requires_grad:
            torch.autograd.backward(total)
        peak = live.peak
    for parameter in trained:
        parameter.grad = None
    return Activations(saved, peak, **world.exchanged)


@torch.no_grad()
def encoding_activations(variant: VariantShapes, shape: StepShape, batch: int) -> int:
    """The most bytes while a chunk of the catalogue or of users is encoded, as at every validation."""
    model, peaks = variant.model.eval(), list[int]()
    for side, tower in _towers(model):
        with META, Live([*model.parameters(), *model.buffers()]) as live:
            model({side: _side(tower, side, shape, batch)})
        peaks.append(live.peak)
    return max(peaks)


def _towers(model: RaRec) -> tuple[tuple[str, Tower], ...]:
    return ("user", model.user), ("item", model.item)


def _side(tower: Tower, side: str, shape: StepShape, rows: int) -> SideBatch:
    slots = sum(tower.slots.values())
    ids_BT = torch.empty(rows, shape.text[side] + slots, dtype=torch.long)
    vectors = {n: torch.empty(rows, k if side == "user" else 1, e) for n, (k, e) in shape.vectors.items()}
    return SideBatch(ids_BT, torch.empty_like(ids_BT), torch.empty(rows, slots, dtype=torch.long), vectors)


def _targets(shape: StepShape, hidden: int) -> LossTargets:
    rows_b, histories_bH = (torch.empty(shape.rows, *more, dtype=torch.long) for more in ((), (HISTORY,)))
    users_bLD, items_bLD = (torch.empty(shape.rows, len(shape.state_blocks), hidden) for _ in range(2))
    return LossTargets(rows_b, rows_b.clone(), histories_bH, users_bLD, items_bLD, shape.total)
