"""From two encodings to the loss of a step, as the configuration chooses it.

Shape letters: B batch, L blocks, D hidden size, K slots, H history, N catalogue.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rarec.config.schema import Loss
from rarec.models.losses import LossTerms, align, bpr, false_negatives, sampled_softmax
from rarec.models.towers import Encoding, RaRec


@dataclass(frozen=True)
class Targets:
    """What the losses need to know of a batch beside its encodings.

    Attributes:
        users_B: user rows.
        items_B: item rows of the targets.
        histories_BH: item rows of the histories, padded with -1.
        user_states_LBD: text-only states of the user prompts at the alignment loss's blocks.
        item_states_LBD: those of the target items.
    """

    users_B: Tensor
    items_B: Tensor
    histories_BH: Tensor
    user_states_LBD: Tensor
    item_states_LBD: Tensor

    def to(self, device: torch.device) -> "Targets":
        """The same targets on another device."""
        return Targets(
            self.users_B.to(device),
            self.items_B.to(device),
            self.histories_BH.to(device),
            self.user_states_LBD.to(device),
            self.item_states_LBD.to(device),
        )


class Objective:
    """L_rec + weight (L_align,user + L_align,item).

    Args:
        config: which losses, with what weights.
        counts_N: how often each item is a training target, for the logQ correction.
        state_blocks: the blocks whose text-only states are stored.
    """

    def __init__(self, config: Loss, counts_N: Tensor, state_blocks: tuple[int, ...]) -> None:
        self.config, self.state_blocks = config, state_blocks
        self.log_q_N = (counts_N.double().clamp_min(1) / counts_N.sum().clamp_min(1)).log().float()

    def __call__(self, model: RaRec, users: Encoding, items: Encoding, targets: Targets) -> LossTerms:
        """The loss terms of one batch."""
        scores_BB = users.vectors_BZ @ items.vectors_BZ.T
        masked_BB = false_negatives(targets.items_B, targets.histories_BH)
        if self.config.recommendation == "bpr":
            recommendation = bpr(scores_BB, masked_BB)
        else:
            log_q_N = self.log_q_N.to(scores_BB.device)
            recommendation = sampled_softmax(
                scores_BB, masked_BB, log_q_N[targets.items_B] if self.config.logq else None
            )
        aligned = self._align(model.user.alignment_blocks, users, targets.user_states_LBD, targets.users_B)
        aligned = aligned + self._align(model.item.alignment_blocks, items, targets.item_states_LBD, targets.items_B)
        return LossTerms(recommendation + self.config.align_weight * aligned, recommendation, aligned)

    def _align(self, blocks: tuple[int, ...], side: Encoding, states_LBD: Tensor, rows_B: Tensor) -> Tensor:
        """One side's alignment loss, over the blocks that have both slots and stored states."""
        ours = self._pooled(side.slots_LBKD, side.projected)
        shared = [block for block in blocks if block in self.state_blocks]
        if ours is None or not shared:
            return torch.zeros((), device=states_LBD.device)
        ours_LBD = ours[[blocks.index(block) for block in shared]]
        states_LBD = states_LBD[[self.state_blocks.index(block) for block in shared]]
        same_BB = (rows_B[:, None] == rows_B[None, :]).fill_diagonal_(False)
        return align(ours_LBD, states_LBD, same_BB, self.config.align_temperature)

    def _pooled(self, slots_LBKD: Tensor | None, projected: Mapping[str, Tensor]) -> Tensor | None:
        """The vector that is compared with the text: the mean of all projections p, or of all slots [c || p]."""
        if slots_LBKD is None or not projected:
            return None
        if self.config.align_pool == "all":
            return slots_LBKD.mean(2)
        return torch.cat(list(projected.values()), 2).mean(2)
