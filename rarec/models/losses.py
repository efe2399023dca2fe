"""The losses: L = L_rec + weight (L_align,user + L_align,item) (METHOD.md, section 4).

Shape letters: b rows of this rank, B rows of the whole batch, L blocks, D hidden size, H history.

In a batch the items of the other users are the negatives, whichever rank they are on; row i of this rank has its own
positive in column own_b[i]. A false negative, the user's own target again or an item of the user's history, is masked
wherever it would count as one. Every loss is a mean over the whole batch, of which a rank has its rows' part.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """What a step reports: the sum that is minimised and its parts, before weighting.

    On several ranks each has its rows' part of them, and the parts of all ranks add up.
    """

    total: Tensor
    recommendation: Tensor
    align: Tensor


class Part(NamedTuple):
    """A rank's part of a mean."""

    summed: Tensor
    terms: Tensor
    """How many were summed."""


def false_negatives(targets_b: Tensor, histories_bH: Tensor, targets_B: Tensor, own_b: Tensor) -> Tensor:
    """(b, B) mask, True where item j is no negative for user i: it is i's target, or stands in i's history.

    Args:
        targets_b: the item row of each user's target.
        histories_bH: item rows of each user's history, padded with -1.
        targets_B: those of the whole batch.
        own_b: where among them each user's own is; the positive itself is False.
    """
    same_bB = targets_b[:, None] == targets_B[None, :]
    known_bB = (histories_bH[:, :, None] == targets_B[None, None, :]).any(1)
    return (same_bB | known_bB).scatter(1, own_b[:, None], False)


def bpr(scores_bB: Tensor, masked_bB: Tensor, own_b: Tensor) -> Part:
    """BPR over in-batch pairs [N]: -ln sigmoid(s(u,i+) - s(u,i-)) for each unmasked negative."""
    kept_bB = (~masked_bB).scatter(1, own_b[:, None], False)
    margins_bB = scores_bB.gather(1, own_b[:, None]) - scores_bB
    losses_bB = -F.logsigmoid(margins_bB).masked_fill(~kept_bB, 0.0)
    return Part(losses_bB.sum(), kept_bB.sum())


def sampled_softmax(scores_bB: Tensor, masked_bB: Tensor, own_b: Tensor, log_q_B: Tensor | None) -> Part:
    """In-batch softmax, the cross-entropy of each positive [ours].

    Args:
        scores_bB: user i against item j, temperature already applied.
        masked_bB: false negatives.
        own_b: the positives' columns.
        log_q_B: log of each item's chance to be drawn as an in-batch item, subtracted from every score (logQ
            correction, Yi et al., RecSys 2019); None for no correction.
    """
    logits_bB = scores_bB if log_q_B is None else scores_bB - log_q_B[None, :]
    return _cross_entropy(logits_bB.masked_fill(masked_bB, float("-inf")), own_b)


def align(ours_LbD: Tensor, states_LBD: Tensor, same_bB: Tensor, own_b: Tensor, temperature: float) -> Part:
    """InfoNCE between what the alignment supplies and the text-only states, in every block (METHOD.md, section 4 [N]).

    -log( exp(cos(d_k, h_k) / tau) / sum_j exp(cos(d_k, h_j) / tau) ), with k against every j of the batch; the mean
    over blocks and rows (both ours).

    Args:
        ours_LbD: one vector for each block and row: the pooled slots.
        states_LBD: pooled text-only states entering the same blocks.
        same_bB: True where rows k and j (k != j) hold the same user or item, which are no negatives of each other.
        own_b: the columns of h_k.
        temperature: tau.
    """
    wide = torch.promote_types(ours_LbD.dtype, torch.float32)
    ours_LbD, states_LBD = (F.normalize(side.to(wide), dim=-1) for side in (ours_LbD, states_LBD))
    logits_LbB = (ours_LbD @ states_LBD.transpose(1, 2) / temperature).masked_fill(same_bB, float("-inf"))
    return _cross_entropy(logits_LbB.flatten(0, 1), own_b.repeat(len(logits_LbB)))


def _cross_entropy(logits_bB: Tensor, own_b: Tensor) -> Part:
    return Part(F.cross_entropy(logits_bB, own_b, reduction="sum"), torch.tensor(len(own_b), device=own_b.device))
