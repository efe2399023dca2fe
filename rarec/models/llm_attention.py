"""How much of its attention the text gives to the slots, measured with eager attention.

Shape letters: B batch, H heads, T positions, L blocks.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rarec.models.backbone import FrozenBackbone
from rarec.models.towers import RaRec, SideBatch

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

    with eager_attention(model.backbone) as eager:
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
    seen_BTT = (mean_BTT > 0).float()
    text_BT = text_BT.bool()
    slots_BT = slots_BT.float()
    share_BT = torch.einsum("bqk,bk->bq", mean_BTT, slots_BT)
    even_BT = torch.einsum("bqk,bk->bq", seen_BTT, slots_BT) / seen_BTT.sum(-1).clamp_min(1)
    return torch.stack([share_BT[text_BT].sum(), even_BT[text_BT].sum(), text_BT.sum()]).double().cpu()


@contextmanager
def eager_attention(backbone: FrozenBackbone) -> Iterator[bool]:
    """Use eager attention over padded prompts within the context; yield False if the model does not support it."""
    trunk: Any = backbone.trunk
    before = trunk.config._attn_implementation
    packs = backbone.packs
    try:
        trunk.set_attn_implementation("eager")
    except (ValueError, ImportError):
        yield False
        return
    backbone.packs = False
    try:
        yield True
    finally:
        trunk.set_attn_implementation(before)
        backbone.packs = packs


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
