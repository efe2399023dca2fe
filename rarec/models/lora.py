"""LoRA weights for a frozen language model, by PEFT."""

from typing import Any

import torch

from rarec.config.method import Lora
from rarec.errors import UserError


def with_lora(model: Any, config: Lora, seed: int) -> Any:
    """The model wrapped in PEFT; the adapter's weights are float32 whatever the base's type.

    Raises:
        UserError: the adapters do not fit the architecture.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = config.targets or _query_and_value(model)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        exclude_modules=_poolers(model, targets) or None,
        bias="none",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"lora.targets: {error}", "name linear modules of this architecture") from None


def _poolers(model: Any, targets: list[str]) -> list[str]:
    """Those of the targets that some encoders have behind their last block: no readout here uses them."""
    names = (name for name, _ in model.named_modules() if "pooler" in name.split("."))
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]


def _query_and_value(model: Any) -> list[str]:
    """The usual targets, by the names that architectures give them."""
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for pair in (
        ["q_proj", "v_proj"],
        ["query", "value"],
        ["c_attn"],
        ["q_lin", "v_lin"],
        ["q", "v"],
        ["query_key_value"],
        ["qkv_proj"],
        ["Wqkv"],
    ):
        if names.issuperset(pair):
            return pair
    raise UserError("lora.targets: cannot tell the query and value projections of this architecture", "name them")
