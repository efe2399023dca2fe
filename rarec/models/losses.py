"""The losses: L = L_rec + weight (L_align,user + L_align,item) (docs/method.md, section 4).

Shape letters: b rows of this rank, B rows of the whole batch, L blocks, D hidden size, K slots, H history, N catalogue.

The negatives of a user are the target items of the other users of the batch, on all ranks; the positive of row i of
this rank is column own_b[i]. False negatives are masked: the user's own target again, and items of the user's history.
Every loss is a mean over the whole batch; each rank computes the part of its own rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rarec.config.method import Loss
from rarec.config.registry import find
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.models.towers import Encoding, RaRec

L = TypeVar("L", bound=Callable[..., "PartialMean"])
FIRST_SCALE = "first_scale"
"""Attribute of a loss; see `first_scale`."""
COMPARED = 1 << 24
"""Items of histories and of the batch that are compared at a time."""


@dataclass(frozen=True)
class LossTargets:
    """The inputs of the losses beside the encodings of a batch.

    Attributes:
        users_b: user rows.
        items_b: item rows of the targets.
        histories_bH: item rows of the histories, padded with -1.
        user_states_bLD: text-only states of the user prompts, in the stored blocks.
        item_states_bLD: text-only states of the target items, in the stored blocks.
        total: B, over all ranks.
    """

    users_b: Tensor
    items_b: Tensor
    histories_bH: Tensor
    user_states_bLD: Tensor
    item_states_bLD: Tensor
    total: int


class LossTerms(NamedTuple):
    """The loss of a step and its parts before weighting; the parts of all ranks add up.

    Attributes:
        total: the sum that is minimised.
        recommendation: L_rec.
        align: L_align,user + L_align,item.
        distil: L_distil.
    """

    total: Tensor
    recommendation: Tensor
    align: Tensor
    distil: Tensor


class PartialMean(NamedTuple):
    """The part of a mean that one rank computes.

    Attributes:
        summed: sum over the terms of this rank.
        terms: number of these terms.
    """

    summed: Tensor
    terms: Tensor


class Objective:
    """L_rec + align_weight (L_align,user + L_align,item) + distil_weight L_distil.

    Args:
        config: the section `loss`.
        counts_N: how often each item is a training target, for the logQ correction.
        state_blocks: the blocks whose text-only states are stored.
        world: the ranks that share each batch. Items and text-only states are gathered from all of them, so the loss
            does not depend on how a batch is split.
    """

    def __init__(self, config: Loss, counts_N: Tensor, state_blocks: tuple[int, ...], world: World = SINGLE) -> None:
        self.config, self.state_blocks, self.world = config, state_blocks, world
        self.recommendation = find("losses", config.recommendation)
        self.log_q_N = (counts_N.double().clamp_min(1) / counts_N.sum().clamp_min(1)).log().float()

    def __call__(self, model: RaRec, users: Encoding, items: Encoding, targets: LossTargets) -> LossTerms:
        """Return this rank's part of the losses of one batch."""
        recommendation = self._recommend(users, items, targets)
        user_blocks, item_blocks = model.user.alignment_blocks, model.item.alignment_blocks
        aligned = self.align(user_blocks, users, targets.user_states_bLD, targets.users_b, targets.total)
        aligned = aligned + self.align(item_blocks, items, targets.item_states_bLD, targets.items_b, targets.total)
        distilled = self._distil(users, targets)
        total = recommendation + self.config.align_weight * aligned + self.config.distil_weight * distilled
        return LossTerms(total, recommendation, aligned, distilled)

    def align(self, blocks: tuple[int, ...], side: Encoding, states_bLD: Tensor, rows_b: Tensor, total: int) -> Tensor:
        """Return one side's alignment loss, over the blocks that have both slots and stored states.

        Args:
            blocks: the blocks that get slots on this side.
            side: encoding of the batch's users or items.
            states_bLD: their text-only states in the stored blocks.
            rows_b: their rows; equal rows are not negatives of each other.
            total: B.
        """
        pooled_LbD = self._pooled(side.slots_LBKD, side.projected)
        shared = [block for block in blocks if block in self.state_blocks]
        if pooled_LbD is None or not shared:
            return torch.zeros((), device=states_bLD.device)
        pooled_LbD = pooled_LbD[[blocks.index(block) for block in shared]]
        states_bLD = states_bLD[:, [self.state_blocks.index(block) for block in shared]]
        return self._contrast(pooled_LbD, states_bLD, rows_b, total)

    def _distil(self, users: Encoding, targets: LossTargets) -> Tensor:
        if users.distilled is None:
            return torch.zeros((), device=users.vectors_BZ.device)
        student_bE, teacher_bE = users.distilled
        return self._contrast(student_bE[None], teacher_bE[:, None], targets.users_b, targets.total)

    def _contrast(self, own_LbD: Tensor, others_bLD: Tensor, rows_b: Tensor, total: int) -> Tensor:
        """Return InfoNCE of this rank's vectors against those of all ranks; equal rows are no negatives."""
        others_LBD = self.world.gather_rows(others_bLD, total).transpose(0, 1)
        own_b = self.world.local_rows(total)
        same_bB = rows_b[:, None] == self.world.gather_rows(rows_b, total)[None, :]
        same_bB = same_bB.scatter(1, own_b[:, None], False)
        return self._mean(align(own_LbD, others_LBD, same_bB, own_b, self.config.align_temperature))

    def _recommend(self, users: Encoding, items: Encoding, targets: LossTargets) -> Tensor:
        own_b = self.world.local_rows(targets.total)
        items_B = self.world.gather_rows(targets.items_b, targets.total)
        scores_bB = users.vectors_BZ @ self.world.gather_rows(items.vectors_BZ, targets.total).T
        masked_bB = false_negatives(targets.items_b, targets.histories_bH, items_B, own_b)
        log_q_B = self.log_q_N.to(scores_bB.device)[items_B] if self.config.logq else None
        part = self.recommendation(scores_bB, masked_bB, own_b, log_q_B)
        if not isinstance(part, PartialMean):  # of a loss of the user's own
            problem = f"{self.config.recommendation} returns {type(part).__name__}, not a PartialMean"
            raise UserError(f"field `loss.recommendation`: {problem}", "return PartialMean(summed, terms)")
        return self._mean(part)

    def _pooled(self, slots_LBKD: Tensor | None, projected: Mapping[str, Tensor]) -> Tensor | None:
        """Return the vectors (L, b, D) compared with the text: the mean of all projections p, or of all slots."""
        if slots_LBKD is None or not projected:
            return None
        if self.config.align_pool == "all":
            return slots_LBKD.mean(2)
        return torch.cat(list(projected.values()), 2).mean(2)

    def _mean(self, part: PartialMean) -> Tensor:
        """Return this rank's part of the mean over the whole batch."""
        return part.summed / self.world.all_reduce_sum(part.terms).clamp_min(1)


def false_negatives(targets_b: Tensor, histories_bH: Tensor, targets_B: Tensor, own_b: Tensor) -> Tensor:
    """Return a mask (b, B), True where item j is not a negative of user i: it is i's target or in i's history.

    Args:
        targets_b: the item row of each user's target.
        histories_bH: item rows of each user's history, padded with -1.
        targets_B: the targets of the whole batch.
        own_b: the column of each user's own target; False there.
    """
    same_bB = targets_b[:, None] == targets_B[None, :]
    known_bB = torch.zeros_like(same_bB)
    for part_bH in histories_bH.split(max(1, COMPARED // known_bB.numel()), dim=1):  # histories may be very long
        known_bB |= (part_bH[:, :, None] == targets_B[None, None, :]).any(1)
    return (same_bB | known_bB).scatter(1, own_b[:, None], False)


def first_scale(scale: float) -> Callable[[L], L]:
    """Declare a loss's factor on scores of vectors that are not normalised, at the first step.

    A loss without it begins with `1 / loss.temperature`, as all do with `readout.normalise`.
    """

    def declare(loss: L) -> L:
        setattr(loss, FIRST_SCALE, scale)
        return loss

    return declare


@first_scale(1.0)
def bpr(scores_bB: Tensor, masked_bB: Tensor, own_b: Tensor, log_q_B: Tensor | None = None) -> PartialMean:
    """Sum the BPR loss over in-batch pairs [N]: -ln sigmoid(s(u,i+) - s(u,i-)) for each unmasked negative.

    Args:
        scores_bB: user i against item j, temperature already applied.
        masked_bB: false negatives.
        own_b: the positives' columns.
        log_q_B: not used.
    """
    kept_bB = (~masked_bB).scatter(1, own_b[:, None], False)
    margins_bB = scores_bB.gather(1, own_b[:, None]) - scores_bB
    losses_bB = -F.logsigmoid(margins_bB).masked_fill(~kept_bB, 0.0)
    return PartialMean(losses_bB.sum(), kept_bB.sum())


def sampled_softmax(scores_bB: Tensor, masked_bB: Tensor, own_b: Tensor, log_q_B: Tensor | None) -> PartialMean:
    """Sum the in-batch softmax loss, the cross-entropy of each positive [D].

    Args:
        scores_bB: user i against item j, temperature already applied.
        masked_bB: false negatives.
        own_b: the positives' columns.
        log_q_B: log of each item's chance to be drawn as an in-batch item, subtracted from every score (logQ
            correction, Yi et al., RecSys 2019); None for no correction.
    """
    logits_bB = scores_bB if log_q_B is None else scores_bB - log_q_B[None, :]
    return _cross_entropy(logits_bB.masked_fill(masked_bB, float("-inf")), own_b)


def align(pooled_LbD: Tensor, states_LBD: Tensor, same_bB: Tensor, own_b: Tensor, temperature: float) -> PartialMean:
    """Sum the InfoNCE loss between pooled slots and text-only states, in every block (docs/method.md, section 4 [N]).

    -log( exp(cos(d_k, h_k) / tau) / sum_j exp(cos(d_k, h_j) / tau) ), with k against every j of the batch. The mean
    over blocks and rows is [D].

    Args:
        pooled_LbD: one vector for each block and row: the pooled slots.
        states_LBD: pooled text-only states entering the same blocks.
        same_bB: True where rows k and j (k != j) hold the same user or item: they are not negatives of each other.
        own_b: the columns of h_k.
        temperature: tau.
    """
    wide = torch.promote_types(pooled_LbD.dtype, torch.float32)
    pooled_LbD, states_LBD = (F.normalize(side.to(wide), dim=-1) for side in (pooled_LbD, states_LBD))
    logits_LbB = (pooled_LbD @ states_LBD.transpose(1, 2) / temperature).masked_fill(same_bB, float("-inf"))
    return _cross_entropy(logits_LbB.flatten(0, 1), own_b.repeat(len(logits_LbB)))


def _cross_entropy(logits_bB: Tensor, own_b: Tensor) -> PartialMean:
    summed = F.cross_entropy(logits_bB, own_b, reduction="sum")
    return PartialMean(summed, torch.tensor(len(own_b), device=own_b.device))
