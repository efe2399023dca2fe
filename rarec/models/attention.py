"""How much of its attention the text gives to the slots, block by block (ours).

Shape letters: B batch, H heads, T positions, L blocks.

Attention weights exist only under eager attention, which a pass is switched to and back from. One block's weights are
in memory at a time: they are summed up where the block's attention hands them out.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rarec.models.backbone import FrozenBackbone
from rarec.models.towers import RaRec, SideBatch

See = Callable[[int, Tensor], None]


class SlotShare(NamedTuple):
    """One block.

    Attributes:
        block: its index.
        share: of the attention of text positions, what falls on slots; the mean over heads, positions and prompts.
        even: what would, if each position attended evenly to all that it sees.
    """

    block: int
    share: float
    even: float


def slot_attention(attention_BHTT: Tensor, slots_BT: Tensor, text_BT: Tensor) -> Tensor:
    """Sums over all text positions, as queries: attention on slots, what even attention would give, positions (3,).

    Args:
        attention_BHTT: weights of each query (third) over keys (last); zero where a key is masked.
        slots_BT: 1 at slots.
        text_BT: 1 at text.
    """
    mean_BTT = attention_BHTT.mean(1, dtype=torch.float32)
    seen_BTT, text_BT, slots_BT = (mean_BTT > 0).float(), text_BT.bool(), slots_BT.float()
    share_BT = torch.einsum("bqk,bk->bq", mean_BTT, slots_BT)
    even_BT = torch.einsum("bqk,bk->bq", seen_BTT, slots_BT) / seen_BTT.sum(-1).clamp_min(1)
    return torch.stack([share_BT[text_BT].sum(), even_BT[text_BT].sum(), text_BT.sum()]).double().cpu()


@torch.no_grad()
def slot_shares(model: RaRec, side: str, batches: Iterable[SideBatch]) -> list[SlotShare]:
    """How much of the text's attention falls on slots, in every block that gives its attention weights.

    An architecture that cannot give them, or not under eager attention, has no rows. All ranks must ask.

    Args:
        model: with slots on that side.
        side: `user` or `item`.
        batches: few and small: eager attention takes memory with the square of the length.
    """
    totals: dict[int, Tensor] = {}

    def add(slots_BT: Tensor, text_BT: Tensor, block: int, attention_BHTT: Tensor) -> None:
        sums = slot_attention(attention_BHTT, slots_BT, text_BT)
        totals[block] = totals[block] + sums if block in totals else sums

    with eager_attention(model.backbone.trunk) as eager:
        for batch in batches if eager else ():
            slots_BT = torch.zeros_like(batch.mask_BT).scatter(1, batch.positions_BK, 1)
            text_BT = batch.mask_BT * (1 - slots_BT)
            with _watched(model.backbone, batch.mask_BT.shape[1], partial(add, slots_BT, text_BT)):
                model({side: batch})
    return [SlotShare(block, float(s / n), float(e / n)) for block, (s, e, n) in sorted(totals.items())]


@contextmanager
def eager_attention(trunk: Any) -> Iterator[bool]:
    """In it a transformers model computes its attention weights in sight; False where it says that it cannot."""
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
def _watched(backbone: FrozenBackbone, length: int, see: See) -> Iterator[None]:
    """In it `see` is shown each block's attention weights (B, H, T, T), once; T is the `length`."""
    seen: set[int] = set()

    def look(index: int, module: nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else ()
        weights = [part for part in parts if isinstance(part, Tensor) and part.shape[2:] == (length, length)]
        if weights and index not in seen:  # what wraps the attention may hand its weights on
            seen.add(index)
            see(index, weights[0])

    parts = [(index, part) for index, block in enumerate(backbone.blocks) for part in block.modules()]
    hooks = [part.register_forward_hook(partial(look, index)) for index, part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
