"""What a client of vLLM computes itself, as ONNX: the slots before its request, the query after it.

Shape letters: B users, S positions of a history, H titles, K slots, E source dimension, D hidden size, F size of the
fused vectors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rarec.export.graph import QueryGraph


class StateQuery(QueryGraph):
    """The searched vectors (B, K, F), from `history`, `state` (B, D), the pooled state of the text, and `titles`."""

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return ["history", "state", *(["titles"] if self.at_titles else [])]

    def encode(self, slots: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """Read out the state, and the slots as they are behind the last block."""
        assert self.model is not None
        tower, state_BD = self.model.user, given["state"]
        last_BKD, roles = state_BD[:, None][:, :0], dict[str, Tensor]()
        if tower.alignment is not None:
            last_BKD, roles = tower.alignment(slots)[0][-1], tower.alignment.role_masks(slots)
        vectors_BZ: Tensor = tower.readout(state_BD[:, None], torch.ones_like(state_BD[:, :1]), last_BKD, roles)
        return vectors_BZ * self.model.log_scale.exp()


class SlotVectors(QueryGraph):
    """The ID vectors of a user's slots, of all sources one behind the other, (B, K * E), from `history`."""

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return ["history", *(["titles"] if self.at_titles else [])]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the vectors."""
        given, vectors = self.read(*inputs)
        found = self.slots(vectors, given)
        assert self.model is not None
        return torch.cat([found[name].flatten(1) for name in self.model.user.slots], 1)


class InputSlots(SlotVectors):
    """The slots themselves where they enter the first block, (B, K, D)."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the slots."""
        given, vectors = self.read(*inputs)
        assert self.model is not None
        assert self.model.user.alignment is not None
        slots_LBKD: Tensor = self.model.user.alignment(self.slots(vectors, given))[0]
        return slots_LBKD[0]
