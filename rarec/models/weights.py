"""What trains, taken out of a model and put back: alignment and readout in safetensors, LoRA in plain PEFT format."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rarec.errors import UserError
from rarec.models.towers import RaRec

ALIGNMENT = "alignment.safetensors"
LORA = "lora"
_FROZEN = "backbone."


def alignment_state(model: RaRec) -> dict[str, Tensor]:
    """Every tensor beside the backbone: both sides' alignment, heads, scale, alpha."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_FROZEN)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_weights(model: RaRec, directory: Path) -> None:
    """Write `alignment.safetensors` and, where the model has LoRA, `lora/` as PEFT writes it."""
    state = alignment_state(model)
    if any(not tensor.isfinite().all() for tensor in state.values()):
        raise ValueError("refusing to save weights that are not finite")
    save_file(state, directory / ALIGNMENT)
    if hasattr(model.backbone.model, "peft_config"):
        model.backbone.model.save_pretrained(directory / LORA, safe_serialization=True)


def load_weights(model: RaRec, directory: Path) -> None:
    """Read what `save_weights` wrote into a model of the same shape.

    Raises:
        UserError: a file is missing or torn, or its tensors are not those of this model.
    """
    path = directory / ALIGNMENT
    state = _read(path)
    _check(state, alignment_state(model), path)
    model.load_state_dict(state, strict=False)
    if hasattr(model.backbone.model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model.backbone.model, _read(directory / LORA / "adapter_model.safetensors"))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}", "train again, or take an earlier checkpoint") from None


def _check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    differing = {name for name in {*found, *wanted} if _shape(found.get(name)) != _shape(wanted.get(name))}
    if differing:
        name = min(differing)
        raise UserError(
            f"{path}: tensor {name} is {_shape(found.get(name))} there and {_shape(wanted.get(name))} in this model",
            "use the configuration that it was trained with",
        )


def _shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
