"""The alignment module: ID vectors and contextual instructions become slots in every block (docs/method.md, section 2).

Shape letters: B batch, L blocks, M instructions, K vectors of a source, E source dimension, S slots of all sources,
D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rarec.errors import UserError

INSTRUCTIONS, VECTORS, TITLES = ROLES = ("instructions", "vectors", "titles")
"""What a slot holds: an instruction c, the projection p of the user's or item's vector, or that of an item at its title
in a history."""


@dataclass(frozen=True)
class SlotShape:
    """The vectors of one source on one side: K vectors of dimension E for each user or item.

    Attributes:
        vectors: K; at titles the most titles of a history. Zeros stand for those that a history lacks.
        dim: E.
        at_titles: whether they are the vectors of the items of a history. Their slots have no instructions, and are no
            part of the alignment loss.
    """

    vectors: int
    dim: int
    at_titles: bool = False


class SourceAlignment(nn.Module):
    """Slots d = [c || p], p = W e + b, for one source on one side, with separate maps for every block.

    The vectors are standardised first (a fixed affine map, which W and b could absorb), so that one learning rate fits
    all ID models. A zero vector means a missing one, as of a new item: a learned vector replaces it [D], which
    starts at the mean of all. W, b and c are in units of each block, the standard deviation of its hidden states
    [D], for the same reason: states can be a hundred times as long in one model, or block, as in another. A map
    behind the last block is in the unit of the whitening that follows it.

    A subclass overrides `project` to map vectors otherwise (docs/extend.md). What it adds to W e + b should be zero at
    first, so that training starts at the ridge regression, and in the units of `unit_L`. Its parameters are trained
    with the rate `train.lr_slots`, and saved in `alignment.safetensors`.

    Args:
        blocks: L.
        hidden: D.
        shape: K and E.
        instructions: M, the number of contextual instruction vectors c in each block.
        projections: whether the slots hold p (not in `prefix_only`, which has c alone).
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
        """Set maps and instructions to small random numbers, as transformers initialises weights."""
        for parameter in (self.instructions_LMD, self.weight_LDE if self.projections else None):
            if parameter is not None:
                nn.init.normal_(parameter, std=spread, generator=generator)

    def standardise(self, vectors_NE: Tensor) -> None:
        """Take mean and standard deviation of each dimension from these vectors; a constant one is not scaled."""
        spread_E = vectors_NE.std(0, unbiased=False)
        self.center_E.copy_(vectors_NE.mean(0))
        self.scale_E.copy_(torch.where(spread_E > 1e-6, spread_E, 1.0))

    def rescale_last(self, unit: Tensor) -> None:
        """Change the unit of the last block, and scale its weights so that its slots do not change."""
        factor = self.unit_L[-1] / unit
        instructions = [self.instructions_LMD] if self.instructions_LMD is not None else []
        for parameter in (self.weight_LDE, self.bias_LD, *instructions):
            parameter[-1] *= factor
        self.unit_L[-1] = unit

    def project(self, vectors_BKE: Tensor) -> Tensor:
        """Return p = W e + b in every block, as (L, B, K, D).

        Args:
            vectors_BKE: vectors of users or items; zeros where one is missing.
        """
        standard_BKE = self.standardised(vectors_BKE)
        projected_LBKD = torch.einsum("lde,bke->lbkd", self.weight_LDE, standard_BKE) + self.bias_LD[:, None, None]
        return projected_LBKD * self.unit_L[:, None, None, None]

    def standardised(self, vectors_BKE: Tensor) -> Tensor:
        """Return standardised vectors (B, K, E), with the learned vector in the place of missing ones."""
        present_BK1 = (vectors_BKE != 0).any(-1, keepdim=True)
        standard_BKE = (vectors_BKE.to(self.weight_LDE.dtype) - self.center_E) / self.scale_E
        return torch.where(present_BK1, standard_BKE, self.fallback_E)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its slots: `instructions`, and `vectors` or `titles`."""
        projected = TITLES if self.shape.at_titles else VECTORS
        has = {INSTRUCTIONS: self.instructions_LMD is not None, projected: self.projections}
        return tuple(role for role in ROLES if has.get(role))

    def role_mask(self, role: str, vectors_BKE: Tensor) -> Tensor:
        """Return a mask (B, M + K) of the slots with a role, without those whose vector is missing."""
        vectors = self.shape.vectors if self.projections else 0
        mask_BS = vectors_BKE.new_full((vectors_BKE.shape[0], self.count), role == INSTRUCTIONS, dtype=torch.bool)
        own = role != INSTRUCTIONS and role in self.roles
        mask_BS[:, self.count - vectors :] = (vectors_BKE != 0).any(-1) if own else False
        return mask_BS

    def forward(self, vectors_BKE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return slots (L, B, M + K, D), and p (L, B, K, D) or None."""
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
    """The slots of one side from all its sources, in the order of `shapes`.

    Args:
        shapes: shape of each source that the side's template names.
        blocks: indices of the blocks that get slots; the number of blocks means a map behind the last one.
        hidden: D.
        instructions: number of contextual instructions of each source in each block.
        projections: whether slots hold projected vectors; if not, instructions alone.
        source_class: the class that maps one source.

    Raises:
        UserError: a source has a name that torch reserves.
    """

    def __init__(
        self,
        shapes: Mapping[str, SlotShape],
        blocks: tuple[int, ...],
        hidden: int,
        instructions: int,
        projections: bool,
        source_class: type[SourceAlignment] = SourceAlignment,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        for name in shapes:
            if "." in name or hasattr(nn.ModuleDict, name):
                raise UserError(f"sources: {name!r} is a reserved name", "choose another name")
        count = len(blocks)
        self.sources = nn.ModuleDict(
            {
                name: source_class(count, hidden, shape, 0 if shape.at_titles else instructions, projections)
                for name, shape in shapes.items()
            }
        )

    @property
    def slots(self) -> dict[str, int]:
        """The number of slots of each source, in the order in which `forward` returns them."""
        return {name: source.count for name, source in self.named_sources()}

    def named_sources(self) -> list[tuple[str, SourceAlignment]]:
        """Return the alignment of each source, with its name."""
        return [(name, cast(SourceAlignment, source)) for name, source in self.sources.items()]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its slots."""
        roles = {role for _, source in self.named_sources() for role in source.roles}
        return tuple(role for role in ROLES if role in roles)

    def role_masks(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a mask (B, S) for each role, without slots whose vector is missing."""
        masks = {
            role: [source.role_mask(role, vectors[name]) for name, source in self.named_sources()]
            for role in self.roles
        }
        return {role: torch.cat(masks_BS, 1) for role, masks_BS in masks.items()}

    def forward(self, vectors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return slots (L, B, S, D), and the projections p (L, B, K, D) of each source for the alignment loss."""
        slots = []
        projected = {}
        for name, source in self.named_sources():
            slots_LBKD, projected_LBKD = source(vectors[name])
            slots.append(slots_LBKD)
            if projected_LBKD is not None and not source.shape.at_titles:
                projected[name] = projected_LBKD
        return torch.cat(slots, 2), projected
