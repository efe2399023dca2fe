"""Save and load the trained weights: alignment and readout in safetensors, LoRA in plain PEFT format."""

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
    """Return every tensor outside the backbone: both sides' alignment, whitening and heads, and the scale.

    Args:
        model: a model, possibly sharded by an engine.
        trained: the gathered trainable parameters by name, if the model is sharded.
    """
    # not `model.state_dict()`: its FSDP hooks need all ranks, and this may run on one alone
    sides = {"user": model.user, "item": model.item}
    state = {f"{side}.{name}": tensor for side, tower in sides.items() for name, tensor in tower.state_dict().items()}
    state |= dict(model.named_parameters(recurse=False))
    state |= {name: tensor for name, tensor in (trained or {}).items() if name in state}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save_weights(
    model: RaRec, directory: Path, trained: Weights | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write `alignment.safetensors` and, if the model has LoRA weights, `lora/` in PEFT's format.

    Args:
        model: a model, possibly sharded by an engine.
        directory: an existing directory.
        trained: the gathered trainable parameters by name, if the model is sharded.
        dtype: dtype of the trainable parameters in the first file.

    Raises:
        ValueError: a tensor is empty, or not finite.
        UserError: a value is too large for the dtype.
    """
    state, peft = alignment_state(model, trained), model.backbone.model if _has_lora(model) else None
    lora = {name.removeprefix(_PEFT): tensor for name, tensor in (trained or {}).items() if name.startswith(_PEFT)}
    for name, tensor in {**state, **lora}.items():
        if not tensor.numel() or not tensor.isfinite().all():
            raise ValueError(f"cannot save {name}: it is {'not finite' if tensor.numel() else 'empty'}")
    # buffers of the whitening stay float32: they invert large variances, and need the precision
    parameters = {name for name, _ in model.named_parameters()}
    written = {name: tensor.to(dtype) if name in parameters else tensor for name, tensor in state.items()}
    if large := [name for name, tensor in written.items() if not tensor.isfinite().all()]:
        raise UserError(f"{large[0]} overflows {dtype}".replace("torch.", ""), "set export.dtype: float32")
    save_file(written, directory / ALIGNMENT)
    if peft is not None:
        peft.save_pretrained(directory / LORA, safe_serialization=True, state_dict=lora or None)


def load_weights(model: RaRec, directory: Path) -> None:
    """Load what `save_weights` wrote into a model of the same shape.

    Raises:
        UserError: a file is missing or damaged, or has other tensors than this model.
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
        raise UserError(f"cannot read {path}: {error}", "train again, or use an earlier checkpoint") from None


def _check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    differing = {name for name in {*found, *wanted} if _shape(found.get(name)) != _shape(wanted.get(name))}
    if differing:
        name = min(differing)
        raise UserError(
            f"{path}: tensor {name} is {_shape(found.get(name))}, but in this model {_shape(wanted.get(name))}",
            "use the configuration that the file was trained with",
        )


def _shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
