"""The training loss of an ID model: a softmax of each target over itself and a sample of the items.

Shape letters: b windows of this rank, T positions, P targets of this rank, K states of a position, M negatives, U items
of a step, E dimension.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ids.models import SequenceModel
from rarec.ids.windows import Group, own_rows

PIECE = 256
"""Targets whose scores are computed at a time: the scores of all, a hundred megabytes, would not stay in cache."""
NOT_COUNTED = -1e30
"""A score that adds nothing to the softmax. Not minus infinity: if no negative counts, its gradient would be NaN."""


class SampledSoftmax:
    """The sum over targets of -log p(target | target and negatives), of one rank's windows.

    Its dropout draws alike on any number of ranks, so the losses of a training do not depend on that number.

    Args:
        encoder: the ID model; its dropout modules are replaced.
        world: the ranks that share each batch.
        dtype: of the encoder's and the scores' arithmetic.
    """

    def __init__(self, encoder: SequenceModel, world: World = SINGLE, dtype: torch.dtype = torch.float32) -> None:
        self.encoder, self.world, self.dtype = encoder, world, dtype
        self._dropouts = _share_dropout(encoder, world)

    def __call__(self, groups: Sequence[Group], negatives_M: Tensor, rows_U: Tensor, vectors_UE: Tensor) -> Tensor:
        """Return the sum.

        Of several states of a position, the one with the highest score of the target counts (ComiRec's equation 8).

        Args:
            groups: this rank's windows.
            negatives_M: item rows shared by all targets. A negative that equals a target does not count for it.
            rows_U: all item rows of these, sorted, each once.
            vectors_UE: their vectors.
        """
        with torch.autocast(vectors_UE.device.type, self.dtype, enabled=self.dtype != torch.float32):
            positives_P = torch.cat([group.targets_P for group in groups])
            # One look-up for all, so that the gradient of the vectors is computed once.
            wanted = [*(group.inputs_bT.flatten() for group in groups), positives_P, negatives_M]
            found = nn.functional.embedding(torch.searchsorted(rows_U, torch.cat(wanted)), vectors_UE)
            *inputs, positives_PE, negatives_ME = found.split([len(some) for some in wanted])
            states_PKE = torch.cat([self._states(group, own) for group, own in zip(groups, inputs, strict=True)])
            best_P = torch.einsum("pke,pe->pk", states_PKE, positives_PE).argmax(1)
            states_PE = states_PKE[torch.arange(len(best_P), device=best_P.device), best_P]
            positive_P = (states_PE * positives_PE).sum(1).float()
            pieces = zip(states_PE.split(PIECE), positives_P.split(PIECE), strict=True)
            rest_P = torch.cat([_log_sum(some_PE @ negatives_ME.T, own_P, negatives_M) for some_PE, own_P in pieces])
            loss: Tensor = (torch.logaddexp(positive_P, rest_P) - positive_P).sum()
        return loss

    def _states(self, group: Group, inputs_E: Tensor) -> Tensor:
        """Return the encoder's states of a group's targets, (P, K, E), from the vectors of its inputs."""
        inputs_bTE = inputs_E.view(*group.inputs_bT.shape, -1)
        for dropout in self._dropouts:
            dropout.total = group.total
        states_bTKE: Tensor = self.encoder(inputs_bTE, group.lengths_b)
        expected = (*inputs_bTE.shape[:2], self.encoder.per_user, inputs_bTE.shape[2])
        if states_bTKE.shape != expected:  # of a model of the user's own
            problem = f"{type(self.encoder).__name__}.forward returns states of shape {tuple(states_bTKE.shape)}"
            raise UserError(f"field `ids.model`: {problem}", f"return (B, T, K, E), here {expected}")
        return states_bTKE[group.real_bT]


def _log_sum(scores_PM: Tensor, own_P: Tensor, negatives_M: Tensor) -> Tensor:
    """Return the log-sum-exp over the negatives that are not the target's own item, (P,); overwrite the scores."""
    return scores_PM.float().masked_fill_(own_P[:, None] == negatives_M, NOT_COUNTED).logsumexp(1)


class _SharedDropout(nn.Module):
    """Dropout that draws for the windows of all ranks, and takes what is this rank's.

    Attributes:
        total: B, the windows of all ranks.
    """

    def __init__(self, probability: float, world: World) -> None:
        super().__init__()
        self.probability, self.world, self.total = probability, world, 0

    def forward(self, states_b: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return states_b
        dropped_B = _drawn(self.probability, (self.total, *states_b.shape[1:]), states_b.device)
        return states_b.masked_fill(dropped_B[own_rows(self.total, self.world)], 0.0) / (1 - self.probability)


def _drawn(probability: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a mask that is True with some probability, in steps of 2**-16: four draws cost one random number."""
    size = math.prod(shape)
    words = torch.empty(-(-size // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    return (words.view(torch.int16)[:size] < round(probability * 2**16) - 2**15).view(shape)


def _share_dropout(encoder: SequenceModel, world: World) -> list[_SharedDropout]:
    """Replace the dropout modules; return the new ones."""
    found = [
        (parent, name, child)
        for parent in encoder.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout
    ]
    for parent, name, child in found:
        setattr(parent, name, _SharedDropout(child.p, world).train(child.training))
    return [module for module in encoder.modules() if isinstance(module, _SharedDropout)]
