"""Attention of a bfloat16 model on a CPU, computed in float32 (ours).

On a CPU torch's fused attention goes backward through bfloat16 much slower than through float32, the shorter the
prompts the worse; what the casts take is little beside that. `tools/bench_step.py --dtype bfloat16` shows it.

Shape letters: B batch, H heads, G heads of keys and values, T positions, C size of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_float32"
"""By which transformers knows it."""


def _attend(
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


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def widen_attention(model: Any) -> None:
    """Have a transformers model on a CPU compute its fused attention in float32, if its weights are bfloat16."""
    if model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
