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
_PEFT = "backbone.model."

Weights = Mapping[str, Tensor]


def alignment_state(model: RaRec, trained: Weights | None = None) -> dict[str, Tensor]:
    """Every tensor beside the backbone: both sides' alignment, whitening, heads, and the scale.

    Args:
        model: whole, or sharded by an engine.
        trained: what trains, whole, by name, where the model is sharded.
    """
    # not the whole model's `state_dict`: FSDP has hooks there, and one rank alone may be here
    sides = {"user": model.user, "item": model.item}
    state = {f"{side}.{name}": tensor for side, tower in sides.items() for name, tensor in tower.state_dict().items()}
    state |= dict(model.named_parameters(recurse=False))
    state |= {name: tensor for name, tensor in (trained or {}).items() if name in state}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_weights(
    model: RaRec, directory: Path, trained: Weights | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write `alignment.safetensors` and, where the model has LoRA, `lora/` as PEFT writes it; arguments as above.

    Args:
        model: whole, or sharded by an engine.
        directory: that is there.
        trained: what trains, whole, by name, where the model is sharded.
        dtype: of what trains in the first file.

    Raises:
        ValueError: a tensor is empty, or holds what is no number.
        UserError: one is too large for the type.
    """
    state, peft = alignment_state(model, trained), model.backbone.model if _has_lora(model) else None
    lora = {name.removeprefix(_PEFT): tensor for name, tensor in (trained or {}).items() if name.startswith(_PEFT)}
    for name, tensor in {**state, **lora}.items():
        if not tensor.numel() or not tensor.isfinite().all():
            raise ValueError(f"refusing to save {name}: it is {'not finite' if tensor.numel() else 'empty'}")
    # what whitens stays as it is: it undoes long states, and stretches what is small in them
    parameters = {name for name, _ in model.named_parameters()}
    written = {name: tensor.to(dtype) if name in parameters else tensor for name, tensor in state.items()}
    if large := [name for name, tensor in written.items() if not tensor.isfinite().all()]:
        raise UserError(f"{large[0]} overflows {dtype}".replace("torch.", ""), "set export.dtype: float32")
    save_file(written, directory / ALIGNMENT)
    if peft is not None:
        peft.save_pretrained(directory / LORA, safe_serialization=True, state_dict=lora or None)


def load_weights(model: RaRec, directory: Path) -> None:
    """Read what `save_weights` wrote into a model of the same shape.

    Raises:
        UserError: a file is missing or torn, or its tensors are not those of this model.
    """
    path = directory / ALIGNMENT
    state = _read(path)
    _check(state, alignment_state(model), path)
    model.load_state_dict(state, strict=False)
    if _has_lora(model):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model.backbone.model, _read(directory / LORA / "adapter_model.safetensors"))


def _has_lora(model: RaRec) -> bool:
    return hasattr(model.backbone.model, "peft_config")


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
