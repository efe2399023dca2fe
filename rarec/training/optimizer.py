"""AdamW and its learning rates: linear warm-up, then a cosine; readout, alignment and LoRA have rates of their own."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rarec.config.schema import Train


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rates for one step.

    `transformers.get_cosine_schedule_with_warmup` differs: its first step has rate zero, and so changes nothing.

    Args:
        step: index of the step, 0 to steps - 1.
        steps: number of steps.
        warmup: share of the steps that warm up.
    """
    warm = max(1, round(steps * warmup)) if warmup else 0
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: Train) -> torch.optim.AdamW:
    """Return AdamW with parameter groups for the readout, the alignment and LoRA; no group is empty.

    One-dimensional and scalar parameters have no weight decay.
    """
    groups: list[dict[str, Any]] = []
    for part, rate in (("", config.lr), (".alignment.", config.lr_slots), ("lora_", config.lr_lora)):
        for decays in (True, False):
            chosen = [p for n, p in parameters.items() if _part(n) == part and (p.ndim > 1) == decays]
            if chosen:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _part(name: str) -> str:
    return next((part for part in ("lora_", ".alignment.") if part in name), "")
