"""Two towers through one frozen language model: prompt, slots, blocks, readout, score (METHOD.md, sections 1 to 3).

Shape letters: B batch, T positions, K slots or vectors, L blocks, D hidden size, E source dimension, Z size of a
scored vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarec.config.method import Readout as ReadoutConfig
from rarec.models.alignment import AlignmentModule
from rarec.models.backbone import FrozenBackbone, pool_text
from rarec.models.slots import Slots


@dataclass(frozen=True)
class SideBatch:
    """One side of a batch, users or items.

    Attributes:
        ids_BT: token ids, fillers at slots and padding.
        mask_BT: 1 where there is text or a slot.
        positions_BK: of the slots, sources in the alignment's order.
        vectors: for each source, its frozen vectors (B, K, E).
    """

    ids_BT: Tensor
    mask_BT: Tensor
    positions_BK: Tensor
    vectors: Mapping[str, Tensor]

    def to(self, device: torch.device) -> "SideBatch":
        """The same batch on another device."""
        return SideBatch(
            self.ids_BT.to(device),
            self.mask_BT.to(device),
            self.positions_BK.to(device),
            {name: vectors.to(device) for name, vectors in self.vectors.items()},
        )


class Encoding(NamedTuple):
    """What a tower returns: a tuple, since engines look for tensors in tuples, lists and dicts only.

    Attributes:
        vectors_BZ: to score.
        slots_LBKD: all slots, for the alignment loss; None for text only.
        projected: each source's p (L, B, K, D), for the alignment loss.
    """

    vectors_BZ: Tensor
    slots_LBKD: Tensor | None
    projected: Mapping[str, Tensor]


class Readout(nn.Module):
    """Final hidden states to the scored vector (all ours).

    The pooled states of the text, and added to them, if wanted, the mean state of the slots that hold vectors and that
    of the instructions; each of the three whitened and through a head that starts at the identity, if wanted; an L2
    norm, if wanted. Slots that stand for a missing vector are not read: they are the same for all that have none, and
    what they share would drown in the norm what their texts tell apart.

    Args:
        hidden: D.
        config: which of these are wanted.
        reads: which slots' states are read, by their roles.
    """

    center_D: Tensor
    white_ZD: Tensor

    def __init__(self, hidden: int, config: ReadoutConfig, reads: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.config = config
        size = min(hidden, config.size) if config.whiten else hidden
        if config.whiten:
            self.register_buffer("center_D", torch.zeros(hidden))
            self.register_buffer("white_ZD", torch.eye(size, hidden))
        self.head = _identity(size, bias=True) if config.head else nn.Identity()
        heads = {role: _identity(size, bias=False) if config.head else nn.Identity() for role in reads}
        self.slot_heads = nn.ModuleDict(heads)

    def forward(self, hidden_BTD: Tensor, text_BT: Tensor, slots_BKD: Tensor, roles: Mapping[str, Tensor]) -> Tensor:
        """(B, Z) from final hidden states, where there is text, the slots' last states, and which have which role."""
        read_BZ: Tensor = self.head(self.white(pool_text(hidden_BTD, text_BT, self.config.pool)))
        for role, head in self.slot_heads.items():
            read_BZ = read_BZ + head(self._slots(slots_BKD, roles[role]))
        return F.normalize(read_BZ, dim=-1) if self.config.normalise else read_BZ

    def white(self, states_BD: Tensor) -> Tensor:
        """States (B, Z), whitened if wanted."""
        return (states_BD.float() - self.center_D) @ self.white_ZD.T if self.config.whiten else states_BD.float()

    def _slots(self, slots_BKD: Tensor, which_BK: Tensor) -> Tensor:
        """The mean state of some slots, whitened; zero where there is none."""
        weights_BK1 = which_BK.float().unsqueeze(-1)
        count_B1 = weights_BK1.sum(1)
        mean_BD = (slots_BKD.float() * weights_BK1).sum(1) / count_B1.clamp_min(1)
        return self.white(mean_BD) * (count_B1 > 0)


def _identity(size: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(size, size, bias)
    nn.init.eye_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class Tower(nn.Module):
    """One side's own parts.

    Args:
        alignment: None for text only.
        readout: of text and slots.
        injects: whether the slots go through the model. If not, they are read out as the alignment makes them, and the
            prompt has no place for them.
    """

    def __init__(self, alignment: AlignmentModule | None, readout: Readout, injects: bool = True) -> None:
        super().__init__()
        self.alignment, self.readout, self.injects = alignment, readout, injects

    @property
    def slots(self) -> dict[str, int]:
        """How many slots each source takes in the prompt."""
        return self.alignment.slots if self.alignment is not None and self.injects else {}

    @property
    def alignment_blocks(self) -> tuple[int, ...]:
        """The blocks that get slots."""
        return self.alignment.blocks if self.alignment is not None and self.injects else ()

    def forward(self, backbone: FrozenBackbone, batch: SideBatch) -> Encoding:
        """Slots from the sources' vectors, one pass of the frozen model, readout of text and slots."""
        if self.alignment is None:
            hidden_BTD = backbone(batch.ids_BT, batch.mask_BT)
            text_BT = backbone.read(batch.mask_BT)
            return Encoding(self.readout(hidden_BTD, text_BT, hidden_BTD[:, :0], {}), None, {})
        slots_LBKD, projected = self.alignment(batch.vectors)
        slots = Slots(slots_LBKD, batch.positions_BK, self.alignment.blocks) if self.injects else None
        hidden_BTD = backbone(batch.ids_BT, batch.mask_BT, slots)
        text_BT = backbone.read(batch.mask_BT).scatter(1, batch.positions_BK, 0)
        last_BKD = _at(hidden_BTD, batch.positions_BK) if self.injects else slots_LBKD[-1]
        vectors_BZ = self.readout(hidden_BTD, text_BT, last_BKD, self.alignment.by_role(batch.vectors))
        return Encoding(vectors_BZ, slots_LBKD, projected)


def _at(hidden_BTD: Tensor, positions_BK: Tensor) -> Tensor:
    """The states at these positions, (B, K, D)."""
    return hidden_BTD.gather(1, positions_BK.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1]))


class RaRec(nn.Module):
    """The whole model. score(u, i) = users' vector . items' vector, so a catalogue is ranked by one matrix product.

    A learned scale (under `normalise`) multiplies the user's vector.

    Args:
        backbone: the frozen language model.
        user: the user tower.
        item: the item tower.
        scale: the score's multiplier at the start.
        learn_scale: whether it trains.
    """

    def __init__(self, backbone: FrozenBackbone, user: Tower, item: Tower, *, scale: float, learn_scale: bool) -> None:
        super().__init__()
        self.backbone, self.user, self.item = backbone, user, item
        # of one number, not of none: DeepSpeed cannot send those
        self.log_scale = nn.Parameter(torch.tensor([scale]).log(), requires_grad=learn_scale)

    def forward(self, sides: Mapping[str, SideBatch]) -> dict[str, Encoding]:
        """Encode the sides that are given: `user`, `item` or both.

        Always by a call of the whole: an engine that shards the model gathers weights when modules are called.
        """
        encoded: dict[str, Encoding] = {
            side: getattr(self, side)(self.backbone, batch) for side, batch in sides.items()
        }
        if "user" in encoded:
            scaled_BZ = encoded["user"].vectors_BZ * self.log_scale.exp()
            encoded["user"] = encoded["user"]._replace(vectors_BZ=scaled_BZ)
        return encoded
