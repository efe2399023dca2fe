"""The losses: L = L_rec + weight (L_align,user + L_align,item) (method, section 4).

Shape letters: B batch, L blocks, D hidden size, H history.

In a batch the items of the other users are the negatives. A false negative, the user's own target again or an item of
the user's history, is masked wherever it would count as one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """What a step reports: the sum that is minimised and its parts, before weighting."""

    total: Tensor
    recommendation: Tensor
    align: Tensor


def false_negatives(targets_B: Tensor, histories_BH: Tensor) -> Tensor:
    """(B, B) mask, True where item j is no negative for user i: it is i's target, or stands in i's history.

    Args:
        targets_B: the item row of each user's target.
        histories_BH: item rows of each user's history, padded with -1.

    The diagonal, the positive itself, is False.
    """
    same_BB = targets_B[:, None] == targets_B[None, :]
    known_BB = (histories_BH[:, :, None] == targets_B[None, None, :]).any(1)
    return (same_BB | known_BB).fill_diagonal_(False)


def bpr(scores_BB: Tensor, masked_BB: Tensor) -> Tensor:
    """BPR over in-batch pairs [N]: the mean of -ln sigmoid(s(u,i+) - s(u,i-)) over unmasked negatives."""
    kept_BB = ~masked_BB & ~torch.eye(len(scores_BB), dtype=torch.bool, device=scores_BB.device)
    margins_BB = scores_BB.diagonal()[:, None] - scores_BB
    losses_BB = -F.logsigmoid(margins_BB).masked_fill(~kept_BB, 0.0)
    return losses_BB.sum() / kept_BB.sum().clamp_min(1)


def sampled_softmax(scores_BB: Tensor, masked_BB: Tensor, log_q_B: Tensor | None) -> Tensor:
    """In-batch softmax, the mean cross-entropy of the positives [ours].

    Args:
        scores_BB: user i against item j, temperature already applied.
        masked_BB: false negatives.
        log_q_B: log of each item's chance to be drawn as an in-batch item, subtracted from every score (logQ
            correction, Yi et al., RecSys 2019); None for no correction.
    """
    logits_BB = scores_BB if log_q_B is None else scores_BB - log_q_B[None, :]
    logits_BB = logits_BB.masked_fill(masked_BB, float("-inf"))
    return F.cross_entropy(logits_BB, torch.arange(len(logits_BB), device=logits_BB.device))


def align(ours_LBD: Tensor, states_LBD: Tensor, same_BB: Tensor, temperature: float) -> Tensor:
    """InfoNCE between what the alignment supplies and the text-only states, in every block (section 4 [N]).

    -log( exp(cos(d_k, h_k) / tau) / sum_j exp(cos(d_k, h_j) / tau) ), with k against every j of the batch; the mean
    over blocks and rows (both ours).

    Args:
        ours_LBD: one vector for each block and row: the pooled slots.
        states_LBD: pooled text-only states entering the same blocks.
        same_BB: True where rows k and j (k != j) hold the same user or item, which are no negatives of each other.
        temperature: tau.
    """
    wide = torch.promote_types(ours_LBD.dtype, torch.float32)
    ours_LBD, states_LBD = (F.normalize(side_LBD.to(wide), dim=-1) for side_LBD in (ours_LBD, states_LBD))
    logits_LBB = (ours_LBD @ states_LBD.transpose(1, 2) / temperature).masked_fill(same_BB, float("-inf"))
    blocks, batch = logits_LBB.shape[:2]
    labels = torch.arange(batch, device=logits_LBB.device).repeat(blocks)
    return F.cross_entropy(logits_LBB.reshape(blocks * batch, batch), labels)
