"""The two passes of a sample through a trained variant: text only, and with its slots (METHOD.md, section 4).

Shape letters: B of a batch, N items or users of the sample, T positions, L blocks with slots, M instructions, K vectors
of a source, D hidden size.

Every rank computes the whole sample, which is small: so all make the same calls of a model that may lie in shards, and
nothing need be put together.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rarec.evaluation.sample import SideSample
from rarec.models.alignment import AlignmentModule
from rarec.models.backbone import Pool, pool_text
from rarec.models.encode import text_batch
from rarec.models.towers import RaRec, Tower


@dataclass(frozen=True)
class Passes:
    """How a sample goes through a model.

    Attributes:
        model: the variant, served.
        filler: token id for slots and padding.
        batch_size: prompts at a time.
        device: the model's.
    """

    model: RaRec
    filler: int
    batch_size: int
    device: torch.device


@dataclass(frozen=True)
class TextStates:
    """What one block gets of prompts without slots.

    Attributes:
        pooled_ND: h~.
        norm: the median norm of a text position's state. At block 0 that is a word embedding, as the architecture hands
            it on (scaled, with its position, normalised). The median, since a position that serves as attention sink
            can be a thousand times as long as the others.
    """

    pooled_ND: Tensor
    norm: float


@dataclass(frozen=True)
class SoftTokens:
    """A source's slots on one side, in float32 on the CPU.

    Attributes:
        projections_LNKD: p; None where the variant has none.
        instructions_LMD: c; None where there are none.
    """

    projections_LNKD: Tensor | None
    instructions_LMD: Tensor | None


@torch.no_grad()
def text_pass(passes: Passes, sample: SideSample, blocks: tuple[int, ...]) -> list[TextStates]:
    """What each of `blocks` gets without slots."""
    backbone, parts = passes.model.backbone, []
    for start in range(0, len(sample), passes.batch_size):
        prompts = sample.prompts[start : start + passes.batch_size]
        ids_BT, mask_BT = text_batch(prompts, passes.filler, passes.device)
        parts.append(
            backbone.block_inputs(
                ids_BT, mask_BT, blocks, partial(_reduced, backbone.read_mask(mask_BT), backbone.pool)
            )
        )
    whole = [[torch.cat(same) for same in zip(*batches, strict=True)] for batches in zip(*parts, strict=True)]
    return [TextStates(pooled_ND, float(norms.median())) for pooled_ND, norms in whole]


@torch.no_grad()
def slot_pass(passes: Passes, sample: SideSample, tower: Tower, alignment: AlignmentModule) -> dict[str, SoftTokens]:
    """Each source's slots. The whole model is called, since an engine that shards it gathers weights by calls."""
    projected: dict[str, list[Tensor]] = {name: [] for name in alignment.slots}
    first_LSD = torch.empty(0)
    for batch in sample.batches(tower, passes.batch_size, passes.filler):
        encoding = passes.model({sample.side: batch.to(passes.device)})[sample.side]
        if encoding.slots_LBKD is not None:
            first_LSD = encoding.slots_LBKD[:, 0].float().cpu()
        for name, projected_LBKD in encoding.projected.items():
            projected[name].append(projected_LBKD.float().cpu())
    tokens, start = {}, 0
    for name, source in alignment.named_sources():  # in this order they share the slots, each [c || p]
        own_LSD, start = first_LSD[:, start : start + source.count], start + source.count
        instructions_LMD = own_LSD[:, : source.count - source.shape.vectors * source.projections]
        p_LNKD = torch.cat(projected[name], 1) if projected[name] else None
        tokens[name] = SoftTokens(p_LNKD, instructions_LMD if instructions_LMD.shape[1] else None)
    return tokens


def _reduced(text_BT: Tensor, pool: Pool, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled states (B, D), and the norms of all text positions in a row."""
    norms_BT = torch.linalg.vector_norm(hidden_BTD, dim=-1, dtype=torch.float32)
    return pool_text(hidden_BTD, text_BT, pool).cpu(), norms_BT[text_BT.bool()].cpu()
