"""Prompts end to end in one row instead of padded: attention that skips other prompts' positions then wastes nothing.

Decoders of transformers keep the prompts apart by their position ids, which start at 0 in each.

Shape letters: B batch, T positions, K slots, L injected blocks, D hidden size, S all positions that are no padding, and
one more. What lies on padding, such as the slots of titles that a history lacks, is moved to that last position, a
prompt of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rarec.errors import UserError
from rarec.models.slots import Slots

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
"""Values of `model_type` of the decoders that keep packed prompts apart; each has a test."""


@dataclass(frozen=True)
class Packing:
    """Where the positions of a padded batch are in one row.

    Attributes:
        places_BT: the place of each position; S - 1 for padding.
        position_ids_1S: each token's position in its own prompt.
        real_BT: marks what is no padding.
    """

    places_BT: Tensor
    position_ids_1S: Tensor
    real_BT: Tensor

    @classmethod
    def of(cls, mask_BT: Tensor) -> "Packing":
        """Pack prompts, which are padded on the right."""
        real_BT = mask_BT.bool()
        places_BT = torch.where(real_BT, real_BT.flatten().cumsum(0).view_as(mask_BT) - 1, real_BT.sum())
        own_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(mask_BT)
        last = own_BT.new_zeros(1)
        return cls(places_BT, torch.cat([own_BT[real_BT], last])[None], real_BT)

    def packed(self, ids_BT: Tensor) -> Tensor:
        """Return the tokens, (1, S)."""
        return torch.cat([ids_BT[self.real_BT], ids_BT[0, :1]])[None]

    def moved(self, slots: Slots) -> Slots:
        """Return the slots where they are in the row."""
        places_1K = self.places_BT.gather(1, slots.positions_BK).flatten()[None]
        return Slots(slots.slots_LBKD.flatten(1, 2)[:, None], places_1K, slots.blocks)

    def unpacked(self, hidden_1SD: Tensor) -> Tensor:
        """Return the hidden states as they would be padded, (B, T, D); on padding they mean nothing."""
        return hidden_1SD[0][self.places_BT]


def check_packable(model_type: str, name: str) -> None:
    """Refuse to pack prompts for an architecture that would let them see each other.

    Raises:
        UserError: naming those that do not.
    """
    if model_type not in KINDS:
        problem = f"llm.packing: {name!r} is a {model_type} model, which is not known to keep packed prompts apart"
        raise UserError(problem, f"leave llm.packing out, or choose one of {', '.join(KINDS)}")
