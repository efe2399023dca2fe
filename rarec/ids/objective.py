"""What trains an ID model: a sampled softmax over its item table.

Shape letters: N items, R those met in training, B windows, T positions, P targets of a batch, K states of a position,
M negatives, E dimension.
"""

from dataclasses import dataclass

import torch
from torch import nn

from rarec.config.ids import Recipe
from rarec.ids.users import build

PARTS = 4
"""Into which a batch is cut by length: most windows are far shorter than the longest, to which all would be padded."""
PIECE = 256
"""Targets whose scores are computed at a time: the scores of all, a hundred megabytes, would go to memory and back."""
NOT_COUNTED = -1e30
"""A score that adds nothing to the softmax. Not minus infinity: where no negative counts, its gradient is no number."""


def draw_negatives(met_R: torch.Tensor, wanted: int) -> torch.Tensor:
    """Item rows (M,): so many drawn uniformly from those met, or all of them, which makes the softmax a full one."""
    return met_R[torch.randint(len(met_R), (wanted,))] if wanted < len(met_R) else met_R


class WithItems(nn.Module):
    """A model with its item table, and its training loss.

    Args:
        settings: the recipe.
        met_N: which items are met in training. The others' vectors start at zero, and no step changes them: a zero
            vector says that there is none.
    """

    def __init__(self, settings: Recipe, met_N: torch.Tensor) -> None:
        super().__init__()
        self.items = nn.Embedding(len(met_N), settings.dim)
        nn.init.normal_(self.items.weight, std=0.02)
        self.items.weight.data.mul_(met_N[:, None])
        self.encoder = build(settings)

    def loss(self, rows: torch.Tensor, lengths_B: torch.Tensor, negatives_M: torch.Tensor) -> torch.Tensor:
        """Sampled softmax: mean over all targets of -log p(target | target and negatives).

        Of several states of a position the one that scores the target best answers for it (ComiRec's equation 8).

        Args:
            rows: windows of item rows, (B, T + 1), oldest first, padded on the right: inputs, and the item after each.
            lengths_B: number of targets in each window.
            negatives_M: item rows shared by all targets. One that is a target's own item does not count for it.
        """
        parts = [_Part.of(rows[at], lengths_B[at]) for at in lengths_B.argsort(stable=True).chunk(PARTS)]
        positives_P = torch.cat([part.targets_P for part in parts])
        # One lookup for all, so that the gradient of the table is made once.
        looked_up = [*(part.inputs_BT.flatten() for part in parts), positives_P, negatives_M]
        *inputs, positives_PE, negatives_ME = self.items(torch.cat(looked_up)).split([len(some) for some in looked_up])
        states_PKE = torch.cat([part.states(self.encoder, each) for part, each in zip(parts, inputs, strict=True)])
        best_P = torch.einsum("pke,pe->pk", states_PKE, positives_PE).argmax(1)
        states_PE = states_PKE[torch.arange(len(best_P)), best_P]
        positive_P = (states_PE * positives_PE).sum(dim=1)
        pieces = zip(states_PE.split(PIECE), positives_P.split(PIECE), strict=True)
        rest_P = torch.cat([_log_sum(some_PE @ negatives_ME.T, own_P, negatives_M) for some_PE, own_P in pieces])
        loss: torch.Tensor = (torch.logaddexp(positive_P, rest_P) - positive_P).mean()
        return loss


def _log_sum(scores_PM: torch.Tensor, own_P: torch.Tensor, negatives_M: torch.Tensor) -> torch.Tensor:
    """The log of the sum of exponentials over the negatives that are not the target's own item, (P,).

    The scores are overwritten.
    """
    return scores_PM.masked_fill_(own_P[:, None] == negatives_M, NOT_COUNTED).logsumexp(1)


@dataclass(frozen=True)
class _Part:
    """Windows of like length, padded to the longest of them."""

    inputs_BT: torch.Tensor
    targets_P: torch.Tensor
    lengths_B: torch.Tensor
    real_BT: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, lengths_B: torch.Tensor) -> "_Part":
        longest = int(lengths_B.max())
        real_BT = torch.arange(longest) < lengths_B[:, None]
        return cls(rows[:, :longest], rows[:, 1 : longest + 1][real_BT], lengths_B, real_BT)

    def states(self, encoder: nn.Module, inputs_E: torch.Tensor) -> torch.Tensor:
        """The encoder's states of the targets, (P, K, E), from the vectors of all inputs."""
        states_BTKE: torch.Tensor = encoder(inputs_E.view(*self.inputs_BT.shape, -1), self.lengths_B)
        return states_BTKE[self.real_BT]
