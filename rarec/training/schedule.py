"""Learning rates: linear warm-up, then a cosine to zero; readout, alignment and LoRA each at their own rate."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rarec.config.schema import Train


def rate_at(step: int, steps: int, warmup: float) -> float:
    """The factor on the learning rate for the step with this index (0 .. steps-1)."""
    warm = max(1, round(steps * warmup)) if warmup else 0
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: Train) -> torch.optim.AdamW:
    """AdamW with groups for the readout, the alignment and LoRA, where they are there; no group is ever empty.

    One-dimensional and scalar parameters do not decay.
    """
    groups: list[dict[str, Any]] = []
    for part, rate in (("", config.lr), (".alignment.", config.lr_slots), ("lora_", config.lr_lora)):
        for decays in (True, False):
            chosen = [p for n, p in parameters.items() if _part(n) == part and (p.ndim > 1) == decays]
            if chosen:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999))


def _part(name: str) -> str:
    return next((part for part in ("lora_", ".alignment.") if part in name), "")


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate before its step."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
