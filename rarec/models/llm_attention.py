"""Attention of the language model: its fused implementation on CPUs, and how much of it the text gives to the slots.

Shape letters: B batch, H heads, G heads of keys and values, T positions, C size of a head, L blocks.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rarec.models.backbone import FrozenBackbone
from rarec.models.towers import RaRec, SideBatch

SDPA_FLOAT32 = "sdpa_float32"
"""Name of the attention that `use_float32_attention` sets, in transformers' registry."""

Observer = Callable[[int, Tensor], None]
"""Called with the index of a block and its attention weights."""


class SlotShare(NamedTuple):
    """The attention on slots in one block.

    Attributes:
        block: index of the block.
        share: share of the attention of text positions that falls on slots; mean over heads, positions and prompts.
        even: the same share if each position attended evenly to all positions that it sees.
    """

    block: int
    share: float
    even: float


def use_float32_attention(model: Any) -> None:
    """Compute the fused attention of a bfloat16 model in float32; for models on a CPU.

    There the backward pass of torch's fused attention is much slower in bfloat16 than in float32, most of all for short
    prompts; the casts cost little. Other models are left as they are.
    """
    if model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(SDPA_FLOAT32)


def _sdpa_in_float32(
    module: nn.Module,
    queries_BHTC: Tensor,
    keys_BGTC: Tensor,
    values_BGTC: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    out_BTHC, _ = sdpa_attention_forward(
        module, queries_BHTC.float(), keys_BGTC.float(), values_BGTC.float(), attention_mask, **settings
    )
    return out_BTHC.to(queries_BHTC.dtype), None


AttentionInterface.register(SDPA_FLOAT32, _sdpa_in_float32)
AttentionMaskInterface.register(SDPA_FLOAT32, sdpa_mask)


@torch.no_grad()
def slot_shares(model: RaRec, side: str, batches: Iterable[SideBatch]) -> list[SlotShare]:
    """Return the share of the text's attention that falls on slots, for every block that returns attention weights.

    Attention weights exist only under eager attention, which the model is switched to and back from. An architecture
    without it, or one that returns no weights, gives no rows. All ranks must call this together.

    Args:
        model: a model with slots on that side.
        side: `user` or `item`.
        batches: few and small ones: the memory of eager attention grows with the square of the length.
    """
    totals: dict[int, Tensor] = {}

    def add(slots_BT: Tensor, text_BT: Tensor, block: int, attention_BHTT: Tensor) -> None:
        sums = slot_attention(attention_BHTT, slots_BT, text_BT)
        totals[block] = totals[block] + sums if block in totals else sums

    with eager_attention(model.backbone.trunk) as eager, model.backbone.padded():
        for batch in batches if eager else ():
            slots_BT = torch.zeros_like(batch.mask_BT).scatter(1, batch.positions_BK, 1)
            text_BT = batch.mask_BT * (1 - slots_BT)
            with _observed(model.backbone, batch.mask_BT.shape[1], partial(add, slots_BT, text_BT)):
                model({side: batch})
    return [SlotShare(block, float(s / n), float(e / n)) for block, (s, e, n) in sorted(totals.items())]


def slot_attention(attention_BHTT: Tensor, slots_BT: Tensor, text_BT: Tensor) -> Tensor:
    """Sum over all text positions, as queries: attention on slots, the same if attention were even, positions (3,).

    Args:
        attention_BHTT: weights of each query (third axis) over keys (last axis); zero where a key is masked.
        slots_BT: 1 at slots.
        text_BT: 1 at text.
    """
    mean_BTT = attention_BHTT.mean(1, dtype=torch.float32)
    seen_BTT, text_BT, slots_BT = (mean_BTT > 0).float(), text_BT.bool(), slots_BT.float()
    share_BT = torch.einsum("bqk,bk->bq", mean_BTT, slots_BT)
    even_BT = torch.einsum("bqk,bk->bq", seen_BTT, slots_BT) / seen_BTT.sum(-1).clamp_min(1)
    return torch.stack([share_BT[text_BT].sum(), even_BT[text_BT].sum(), text_BT.sum()]).double().cpu()


@contextmanager
def eager_attention(trunk: Any) -> Iterator[bool]:
    """Switch a transformers model to eager attention within the context; yield False if it does not support it."""
    before = trunk.config._attn_implementation
    try:
        trunk.set_attn_implementation("eager")
    except (ValueError, ImportError):
        yield False
        return
    try:
        yield True
    finally:
        trunk.set_attn_implementation(before)


@contextmanager
def _observed(backbone: FrozenBackbone, length: int, observe: Observer) -> Iterator[None]:
    """Within the context, call `observe` once with each block's attention weights (B, H, T, T); T is the `length`.

    Blocks are handled one by one, so the weights of only one of them are in memory.
    """
    seen: set[int] = set()

    def look(index: int, module: nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else ()
        weights = [part for part in parts if isinstance(part, Tensor) and part.shape[2:] == (length, length)]
        if weights and index not in seen:  # a module around the attention may return the same weights again
            seen.add(index)
            observe(index, weights[0])

    parts = [(index, part) for index, block in enumerate(backbone.blocks) for part in block.modules()]
    hooks = [part.register_forward_hook(partial(look, index)) for index, part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
