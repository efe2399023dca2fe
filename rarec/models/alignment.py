"""The alignment module: ID vectors and contextual instructions become slots in every block (METHOD.md, section 2).

Shape letters: B batch, L blocks, M instructions, K vectors of a source, E source dimension, S slots of all sources,
D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rarec.errors import UserError

INSTRUCTIONS, VECTORS = ROLES = ("instructions", "vectors")
"""What a slot is: an instruction c, or the projection p of a vector."""


@dataclass(frozen=True)
class SlotShape:
    """What one source contributes on one side: K vectors of dimension E for each user or item."""

    vectors: int
    dim: int


class SourceAlignment(nn.Module):
    """Slots d = [c || p], p = W e + b, for one source on one side, with maps of its own for every block.

    The vectors are standardised first (a fixed affine map, which W and b could as well absorb), so that one learning
    rate fits all. A zero vector says that there is none, as of a new item: a learned one takes its place (ours), which
    starts at the mean of all. W, b and c are in units of each block, how far its states stray (ours), for the same
    reason: in some models states are a hundred times as long as in others, and in deep blocks as in early ones. A map
    behind the last block is in that of what whitens it.

    Args:
        blocks: L.
        hidden: D.
        shape: K and E.
        instructions: M contextual instruction vectors c in each block.
        projections: whether p is there at all (`prefix_only` has c alone).
    """

    center_E: Tensor
    scale_E: Tensor
    unit_L: Tensor

    def __init__(self, blocks: int, hidden: int, shape: SlotShape, instructions: int, projections: bool) -> None:
        super().__init__()
        self.shape, self.projections = shape, projections
        self.count = instructions + (shape.vectors if projections else 0)
        self.register_buffer("unit_L", torch.ones(blocks))
        self.instructions_LMD = nn.Parameter(torch.empty(blocks, instructions, hidden)) if instructions else None
        if projections:
            self.weight_LDE = nn.Parameter(torch.empty(blocks, hidden, shape.dim))
            self.bias_LD = nn.Parameter(torch.zeros(blocks, hidden))
            self.register_buffer("center_E", torch.zeros(shape.dim))
            self.register_buffer("scale_E", torch.ones(shape.dim))
            self.fallback_E = nn.Parameter(torch.zeros(shape.dim))

    def reset(self, generator: torch.Generator, spread: float = 0.02) -> None:
        """Small random maps and instructions, in the manner of transformers' own initialisation."""
        for parameter in (self.instructions_LMD, self.weight_LDE if self.projections else None):
            if parameter is not None:
                nn.init.normal_(parameter, std=spread, generator=generator)

    def standardise(self, vectors_NE: Tensor) -> None:
        """Take mean and spread of each dimension from these vectors; one that never varies is not scaled."""
        spread_E = vectors_NE.std(0, unbiased=False)
        self.center_E.copy_(vectors_NE.mean(0))
        self.scale_E.copy_(torch.where(spread_E > 1e-6, spread_E, 1.0))

    def rescale_last(self, unit: Tensor) -> None:
        """Have another unit in the last of the blocks; its slots stay as they are."""
        factor = self.unit_L[-1] / unit
        instructions = [self.instructions_LMD] if self.instructions_LMD is not None else []
        for of_blocks in (self.weight_LDE, self.bias_LD, *instructions):
            of_blocks[-1] *= factor
        self.unit_L[-1] = unit

    def project(self, vectors_BKE: Tensor) -> Tensor:
        """P = W e + b in every block, as (L, B, K, D)."""
        there_BK1 = (vectors_BKE != 0).any(-1, keepdim=True)
        standard_BKE = (vectors_BKE.to(self.weight_LDE.dtype) - self.center_E) / self.scale_E
        standard_BKE = torch.where(there_BK1, standard_BKE, self.fallback_E)
        projected_LBKD = torch.einsum("lde,bke->lbkd", self.weight_LDE, standard_BKE) + self.bias_LD[:, None, None]
        return projected_LBKD * self.unit_L[:, None, None, None]

    @property
    def roles(self) -> tuple[str, ...]:
        """What its slots are: `instructions`, `vectors`, or both."""
        has = {INSTRUCTIONS: self.instructions_LMD is not None, VECTORS: self.projections}
        return tuple(role for role in ROLES if has[role])

    def of_role(self, role: str, vectors_BKE: Tensor) -> Tensor:
        """Which slots are of that role, (B, M + K); of `vectors`, those whose vector is there."""
        told = self.shape.vectors if self.projections else 0
        are_BS = vectors_BKE.new_full((len(vectors_BKE), self.count), role == INSTRUCTIONS, dtype=torch.bool)
        are_BS[:, self.count - told :] = (vectors_BKE != 0).any(-1) if role == VECTORS else False
        return are_BS

    def forward(self, vectors_BKE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Slots (L, B, M + K, D), and p (L, B, K, D) or None."""
        batch = vectors_BKE.shape[0]
        parts = []
        if self.instructions_LMD is not None:
            slots_LMD = self.instructions_LMD * self.unit_L[:, None, None]
            parts.append(slots_LMD.unsqueeze(1).expand(-1, batch, -1, -1))
        projected_LBKD = self.project(vectors_BKE) if self.projections else None
        if projected_LBKD is not None:
            parts.append(projected_LBKD)
        return torch.cat(parts, 2), projected_LBKD


class AlignmentModule(nn.Module):
    """One side's slots from all its sources, in the order of `shapes`.

    Args:
        shapes: for each source that the side's template names, its K and E.
        blocks: indices of the blocks that get slots; of a map behind all blocks, how many these are.
        hidden: D.
        instructions: contextual instructions of each source in each block.
        projections: False leaves the instructions alone.

    Raises:
        UserError: a source bears a name that torch needs for itself.
    """

    def __init__(
        self,
        shapes: Mapping[str, SlotShape],
        blocks: tuple[int, ...],
        hidden: int,
        instructions: int,
        projections: bool,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        for name in shapes:
            if "." in name or hasattr(nn.ModuleDict, name):
                raise UserError(f"sources: {name!r} cannot name a source", "choose another name")
        make = {
            n: SourceAlignment(len(blocks), hidden, shape, instructions, projections) for n, shape in shapes.items()
        }
        self.sources = nn.ModuleDict(make)

    @property
    def slots(self) -> dict[str, int]:
        """How many slots each source takes, in the order in which `forward` supplies them."""
        return {name: source.count for name, source in self.named_sources()}

    def named_sources(self) -> list[tuple[str, SourceAlignment]]:
        """The sources' own alignments by name."""
        return [(name, cast(SourceAlignment, source)) for name, source in self.sources.items()]

    @property
    def roles(self) -> tuple[str, ...]:
        """What its slots are; of every source alike."""
        return self.named_sources()[0][1].roles

    def by_role(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which slots are of each role, (B, S); of `vectors`, those whose vector is there."""
        sources = self.named_sources()
        return {role: torch.cat([one.of_role(role, vectors[name]) for name, one in sources], 1) for role in self.roles}

    def forward(self, vectors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Slots (L, B, S, D), and for each source that has them its projections p (L, B, K, D)."""
        slots, projected = [], {}
        for name, source in self.named_sources():
            slots_LBKD, projected_LBKD = source(vectors[name])
            slots.append(slots_LBKD)
            if projected_LBKD is not None:
                projected[name] = projected_LBKD
        return torch.cat(slots, 2), projected
