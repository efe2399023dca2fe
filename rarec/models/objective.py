"""From two encodings to the loss of a step, as the configuration chooses it.

Shape letters: b rows of this rank, B rows of the whole batch, L blocks, D hidden size, K slots, H history, N catalogue.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rarec.config.method import Loss
from rarec.models.losses import LossTerms, Part, align, bpr, false_negatives, sampled_softmax
from rarec.models.towers import Encoding, RaRec
from rarec.world import SINGLE, World


@dataclass(frozen=True)
class Targets:
    """What the losses need to know of a batch beside its encodings.

    Attributes:
        users_b: user rows.
        items_b: item rows of the targets.
        histories_bH: item rows of the histories, padded with -1.
        user_states_bLD: text-only states of the user prompts at the alignment loss's blocks.
        item_states_bLD: those of the target items.
        total: B, over all ranks.
    """

    users_b: Tensor
    items_b: Tensor
    histories_bH: Tensor
    user_states_bLD: Tensor
    item_states_bLD: Tensor
    total: int

    def to(self, device: torch.device) -> "Targets":
        """The same targets on another device."""
        return Targets(
            self.users_b.to(device),
            self.items_b.to(device),
            self.histories_bH.to(device),
            self.user_states_bLD.to(device),
            self.item_states_bLD.to(device),
            self.total,
        )


class Objective:
    """L_rec + weight (L_align,user + L_align,item).

    Args:
        config: which losses, with what weights.
        counts_N: how often each item is a training target, for the logQ correction.
        state_blocks: the blocks whose text-only states are stored.
        world: that share each batch. Items and text-only states are gathered from all of them, so that the loss does
            not depend on how a batch is cut.
    """

    def __init__(self, config: Loss, counts_N: Tensor, state_blocks: tuple[int, ...], world: World = SINGLE) -> None:
        self.config, self.state_blocks, self.world = config, state_blocks, world
        self.log_q_N = (counts_N.double().clamp_min(1) / counts_N.sum().clamp_min(1)).log().float()

    def __call__(self, model: RaRec, users: Encoding, items: Encoding, targets: Targets) -> LossTerms:
        """The loss terms of one batch: this rank's part."""
        recommendation = self._recommend(users, items, targets)
        user_blocks, item_blocks = model.user.alignment_blocks, model.item.alignment_blocks
        aligned = self._align(user_blocks, users, targets.user_states_bLD, targets.users_b, targets.total)
        aligned = aligned + self._align(item_blocks, items, targets.item_states_bLD, targets.items_b, targets.total)
        return LossTerms(recommendation + self.config.align_weight * aligned, recommendation, aligned)

    def _recommend(self, users: Encoding, items: Encoding, targets: Targets) -> Tensor:
        own_b = self.world.local_rows(targets.total)
        items_B = self.world.gather_rows(targets.items_b, targets.total)
        scores_bB = users.vectors_BZ @ self.world.gather_rows(items.vectors_BZ, targets.total).T
        masked_bB = false_negatives(targets.items_b, targets.histories_bH, items_B, own_b)
        if self.config.recommendation == "bpr":
            return self._mean(bpr(scores_bB, masked_bB, own_b))
        log_q_B = self.log_q_N.to(scores_bB.device)[items_B] if self.config.logq else None
        return self._mean(sampled_softmax(scores_bB, masked_bB, own_b, log_q_B))

    def _align(self, blocks: tuple[int, ...], side: Encoding, states_bLD: Tensor, rows_b: Tensor, total: int) -> Tensor:
        """One side's alignment loss, over the blocks that have both slots and stored states."""
        ours = self._pooled(side.slots_LBKD, side.projected)
        shared = [block for block in blocks if block in self.state_blocks]
        if ours is None or not shared:
            return torch.zeros((), device=states_bLD.device)
        ours_LbD = ours[[blocks.index(block) for block in shared]]
        states_bLD = states_bLD[:, [self.state_blocks.index(block) for block in shared]]
        states_LBD = self.world.gather_rows(states_bLD, total).transpose(0, 1)
        own_b = self.world.local_rows(total)
        same_bB = rows_b[:, None] == self.world.gather_rows(rows_b, total)[None, :]
        same_bB = same_bB.scatter(1, own_b[:, None], False)
        return self._mean(align(ours_LbD, states_LBD, same_bB, own_b, self.config.align_temperature))

    def _mean(self, part: Part) -> Tensor:
        """This rank's part of the mean over the whole batch."""
        return part.summed / self.world.all_reduce_sum(part.terms).clamp_min(1)

    def _pooled(self, slots_LBKD: Tensor | None, projected: Mapping[str, Tensor]) -> Tensor | None:
        """The vector that is compared with the text: the mean of all projections p, or of all slots [c || p]."""
        if slots_LBKD is None or not projected:
            return None
        if self.config.align_pool == "all":
            return slots_LBKD.mean(2)
        return torch.cat(list(projected.values()), 2).mean(2)
