"""Text-only states: pooled hidden states of prompts without slots, once for each text (METHOD.md, section 4).

Shape letters: N prompts, L blocks, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone
from rarec.prompts import Encoded, by_length, lay_out
from rarec.world import SINGLE

Schedule = Callable[[list[list[int]]], Iterator[tuple[bool, list[int]]]]
"""Of passes, each a list of prompts."""


def text_batch(prompts: Sequence[Encoded], filler: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T) of prompts without slots."""
    laid = lay_out(prompts, {}, filler)
    return torch.from_numpy(laid.ids_BT).to(device), torch.from_numpy(laid.mask_BT).to(device)


def text_states(
    backbone: FrozenBackbone,
    prompts: Sequence[Encoded],
    blocks: Sequence[int],
    filler: int,
    *,
    dtype: str = "float16",
    batch_size: int = 64,
    schedule: Schedule = SINGLE.in_lockstep,
) -> npt.NDArray[np.floating]:
    """States entering `blocks`, as (N, L, D); prompts with the same tokens are computed once.

    Args:
        backbone: the frozen model; LoRA, if it is there, is switched off.
        prompts: filled prompts.
        blocks: indices of blocks.
        filler: token id for padding.
        dtype: of the result.
        batch_size: prompts a pass.
        schedule: which passes this rank makes, from `World`: `alike` for prompts of its own, `in_step` for a share of
            prompts that all ranks know; the states of the others are zero then.

    Raises:
        UserError: a state is too large for the type.
    """
    texts = [prompt.tokens_T.tobytes() for prompt in prompts]
    first: dict[bytes, int] = {}
    for row, text in enumerate(texts):
        first.setdefault(text, row)
    once = list(first.values())
    result = np.zeros((len(prompts), len(blocks), backbone.hidden_size), dtype)
    passes = [[once[at] for at in chunk] for chunk in by_length([prompts[row] for row in once], batch_size)]
    for mine, rows in schedule(passes):
        ids_BT, mask_BT = text_batch([prompts[row] for row in rows], filler, backbone.device)
        states_LBD = backbone.text_states(ids_BT, mask_BT, blocks).float().cpu().numpy()
        if mine:
            with np.errstate(over="ignore"):
                result[rows] = states_LBD.transpose(1, 0, 2)
    if not np.isfinite(result[once]).all():
        raise UserError(f"a text-only state overflows {dtype}", "set shards.state_dtype: float32")
    result[:] = result[[first[text] for text in texts]]
    return result
