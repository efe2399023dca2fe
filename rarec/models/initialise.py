"""The alignment's first values, in closed form, before the first step (ours).

Shape letters: N texts, L blocks, E source dimension, D hidden size, B prompts, T positions, M positions of text.

A slot should look to a frozen block like a hidden state it knows. So c and b start at the mean text-only state of the
block, and W at a ridge regression of text-only states on standardised source vectors: items on their own text, users
on their target's. The mean of word embeddings is no word, and in a decoder slots that start there leave hardly anything
of the texts (METHOD.md, section 2). So in decoders c and b start at the states of one position of a text, the most
typical.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rarec.models.alignment import SourceAlignment
from rarec.models.backbone import FrozenBackbone


def ridge_weights(vectors_NE: Tensor, states_LND: Tensor, penalty: float) -> Tensor:
    """W (L, D, E) minimising |states - mean - W vectors|^2 + penalty N |W|^2, in float64.

    Args:
        vectors_NE: standardised source vectors.
        states_LND: what they should predict.
        penalty: relative to the unit variance of the vectors.
    """
    vectors = vectors_NE.double()
    gram_EE = vectors.T @ vectors / len(vectors)
    gram_EE.diagonal().add_(penalty)
    centred = (states_ND.double() - states_ND.double().mean(0) for states_ND in states_LND)
    moments_LED = torch.stack([vectors.T @ states_ND / len(vectors) for states_ND in centred])
    weights_LED: Tensor = torch.linalg.solve(gram_EE, moments_LED)
    return weights_LED.transpose(1, 2)


def _units(states_LND: Tensor) -> Tensor:
    """How far the states of each block stray from their mean, in a typical dimension (L,); 1 where they do not."""
    units_L = states_LND.std(1, unbiased=False).median(1).values
    return torch.where(units_L > 0, units_L, 1.0)


def typical_states(backbone: FrozenBackbone, ids_BT: Tensor, mask_BT: Tensor, blocks: Sequence[int]) -> Tensor:
    """States (L, D) entering each of `blocks` at the most typical position of these texts.

    That is the one whose states are most like those of all others, by the mean cosine over the blocks.
    """
    text_BT = backbone.read(mask_BT).bool()
    states_LMD = torch.stack(backbone.entering(ids_BT, mask_BT, blocks, lambda h_BTD: h_BTD[text_BT].float()))
    units_LMD = F.normalize(states_LMD, dim=-1)
    likeness_M = torch.einsum("lmd,ld->m", units_LMD, units_LMD.sum(1))
    return states_LMD[:, likeness_M.argmax()]


@torch.no_grad()
def initialise(
    alignment: SourceAlignment,
    vectors_NE: Tensor,
    states_LND: Tensor,
    *,
    penalty: float | None,
    generator: torch.Generator,
    start_LD: Tensor | None = None,
) -> None:
    """Set a source's alignment from pairs of source vectors and text-only states.

    Args:
        alignment: of one source on one side; its L blocks are those of `states_LND`.
        vectors_NE: one vector a text, raw; those that are zero are passed over.
        states_LND: pooled text-only states entering each block.
        penalty: of the ridge regression; None leaves W random.
        generator: of the random parts.
        start_LD: where b and c start; by default at the mean state.
    """
    alignment.reset(generator)
    states_LND = states_LND.float()
    alignment.unit_L.copy_(_units(states_LND))
    begin_LD = (states_LND.mean(1) if start_LD is None else start_LD.cpu()) / alignment.unit_L[:, None]
    if alignment.instructions_LMD is not None:
        alignment.instructions_LMD.add_(begin_LD.unsqueeze(1))
    if alignment.projections:
        alignment.bias_LD.copy_(begin_LD)
        there_N = (vectors_NE != 0).any(1)
        if not there_N.any():  # of a sparse source, a sample of the texts may have none
            return
        alignment.standardise(vectors_NE[there_N])
        if penalty is not None:
            standard_NE = (vectors_NE[there_N] - alignment.center_E) / alignment.scale_E
            weight_LDE = ridge_weights(standard_NE, states_LND[:, there_N], penalty)
            alignment.weight_LDE.copy_(weight_LDE / alignment.unit_L[:, None, None])
