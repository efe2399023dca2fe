"""Attention on the meta device: what the fused kernels save, and nothing of what they compute.

Which kernel a GPU takes cannot be asked without one, so this stands in for all of them. For the backward pass they save
queries, keys, values, the output, and a logarithm of sums for each head and token (Dao et al., FlashAttention, 2022).

Shape letters: B batch, H heads, G heads of keys and values, T positions, C size of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

PADDED, UNPADDED = "planned_padded", "planned_unpadded"
"""By these names transformers knows the two: as `sdpa`, which is given a mask, and `flash_attention_2`, with none."""


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries_BHTC: Tensor, keys_BGTC: Tensor, values_BGTC: Tensor, bias_B1TT: Tensor | None
    ) -> Tensor:
        batch, heads, length, _ = queries_BHTC.shape
        out_BTHC = queries_BHTC.new_empty(batch, length, heads, values_BGTC.shape[-1])
        sums_BHT = queries_BHTC.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(queries_BHTC, keys_BGTC, values_BGTC, bias_B1TT, out_BTHC, sums_BHT)
        return out_BTHC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries_BHTC, keys_BGTC, values_BGTC, *_ = ctx.saved_tensors
        return torch.empty_like(queries_BHTC), torch.empty_like(keys_BGTC), torch.empty_like(values_BGTC), None


def _attend(
    module: nn.Module,
    queries_BHTC: Tensor,
    keys_BGTC: Tensor,
    values_BGTC: Tensor,
    attention_mask: Tensor | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers calls `sdpa`: with a mask, keys and values are repeated for every head, and the mask is cast."""
    if attention_mask is None:
        return _fused(queries_BHTC, keys_BGTC, values_BGTC, None), None
    groups = int(getattr(module, "num_key_value_groups", 1))
    if groups > 1:
        keys_BGTC, values_BGTC = (side.repeat_interleave(groups, 1) for side in (keys_BGTC, values_BGTC))
    bias_B1TT = torch.empty_like(attention_mask, dtype=queries_BHTC.dtype)
    return _fused(queries_BHTC, keys_BGTC, values_BGTC, bias_B1TT), None


def _fused(*inputs: Tensor | None) -> Tensor:
    out_BTHC: Tensor = _Fused.apply(*inputs)  # type: ignore[no-untyped-call]
    return out_BTHC


def _mask(*_: Any, attention_mask: Tensor, **__: Any) -> Tensor:
    """(B, 1, T, T), as `sdpa` is given it: batches are padded, so one is always made."""
    batch, length = attention_mask.shape
    return attention_mask.new_empty(batch, 1, length, length, dtype=torch.bool)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(PADDED, _attend)
AttentionInterface.register(UNPADDED, _attend)
AttentionMaskInterface.register(PADDED, _mask)
AttentionMaskInterface.register(UNPADDED, _no_mask)
