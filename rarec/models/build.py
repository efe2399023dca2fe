"""Build one variant of the method over a loaded language model, and save and load what it has learned.

Trained weights are files apart from the language model: alignment and readout in safetensors, LoRA in PEFT's format.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rarec.config import RunConfig, Variant
from rarec.config.registry import find
from rarec.errors import UserError
from rarec.models.alignment import INSTRUCTIONS, AlignmentModule, SlotShape
from rarec.models.language_model import LoadedModel
from rarec.models.losses import FIRST_SCALE
from rarec.models.towers import IDS, RaRec, Tower
from rarec.prompts import AT_TITLES, slot_names

SIDES = ("user", "item")
ALIGNMENT = "alignment.safetensors"
LORA = "lora"
LORA_WEIGHTS = f"{LORA}/adapter_model.safetensors"
_PEFT = "backbone.model."

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class SourceShape:
    """The shape of a source's vectors; an item always has one.

    Attributes:
        dim: dimension of a vector.
        vectors_per_user: number of vectors of a user.
    """

    dim: int
    vectors_per_user: int

    def side(self, side: str) -> SlotShape:
        """Return its shape on one side."""
        return SlotShape(self.vectors_per_user if side == "user" else 1, self.dim)


def stored_blocks(config: RunConfig, count: int) -> list[int]:
    """Return the blocks whose text-only states shards store, of a language model with `count` blocks.

    Raises:
        UserError: the model lacks one of them.
    """
    return list(_known_blocks("shards.state_blocks", config.shards.state_blocks or range(count), count))


def _known_blocks(field: str, blocks: Iterable[int], count: int) -> tuple[int, ...]:
    """Return blocks that a field names, in their order; refuse one that a model with `count` blocks lacks."""
    chosen = tuple(sorted(set(blocks)))
    if chosen and chosen[-1] >= count:
        raise UserError(f"{field}: the model has no block {chosen[-1]}", f"choose from blocks 0 to {count - 1}")
    return chosen


def slots_reserved(config: RunConfig, shapes: Mapping[str, SourceShape]) -> dict[str, dict[str, int]]:
    """Return the most slots of each source on each side in any variant: truncated prompts leave room for them.

    Those at titles are named by `at_titles`, and are as many as a history may have titles.
    """
    m = config.alignment.instructions
    reserved = {side: {name: m + shape.side(side).vectors for name, shape in shapes.items()} for side in SIDES}
    named = slot_names(config.prompt, "user", list(shapes))
    titles = {name: config.prompt.max_history for name in named if name.endswith(AT_TITLES)}
    return {"user": reserved["user"] | titles, "item": reserved["item"]}


def build_model(
    config: RunConfig,
    variant: Variant,
    loaded: LoadedModel,
    shapes: Mapping[str, SourceShape],
    named: Mapping[str, Sequence[str]],
) -> RaRec:
    """Put a variant's towers around the frozen model. The alignment's weights are not set yet.

    Args:
        config: the run.
        variant: the variant.
        loaded: the language model, with LoRA weights exactly if the variant has them.
        shapes: shape of every source.
        named: the sources that each side's template names.
    """
    backbone = loaded.backbone
    source_class, readout_class = find("alignment_maps", config.alignment.map), find("readouts", config.readout.module)
    count = len(backbone.blocks)
    at_readout = variant.blocks == "readout"
    blocks = aligned_blocks(config, variant, count)
    # In a decoder slots come first and attend to nothing, so their last states hold nothing but the vector.
    slots_from_blocks = not (at_readout or (backbone.sink and variant.projections and config.readout.slots))

    inside = variant.projections and not at_readout  # slots at titles hold nothing but vectors, inside the model

    def tower(side: str) -> Tower:
        places = [name for name in named[side] if inside or not name.endswith(AT_TITLES)]
        chosen = {name: _slot_shape(config, name, side, shapes) for name in places if blocks or not slots_from_blocks}
        m = config.alignment.instructions if variant.instructions else 0
        useful = bool(chosen) and (m > 0 or variant.projections)
        mapped = blocks if slots_from_blocks else (*blocks, count)
        hidden = backbone.hidden_size
        projections = variant.projections
        alignment = AlignmentModule(chosen, mapped, hidden, m, projections, source_class) if useful else None
        reads = alignment.roles if alignment is not None and (config.readout.slots or at_readout) else ()
        if backbone.sink:  # and those of instructions are the same for all users and items
            reads = tuple(role for role in reads if role != INSTRUCTIONS)
        readout = readout_class(hidden, config.readout, reads)
        size = min(hidden, config.readout.size) if config.readout.whiten else hidden
        distils = side == "user" and config.loss.distil_weight > 0
        student = nn.Linear(size, shapes[IDS].dim, bias=False) if distils else None
        return Tower(alignment, readout, slots_from_blocks, student)

    with torch.random.fork_rng(devices=[]):  # for random parameters of the user's own maps and readouts
        torch.manual_seed(config.run.seed)
        user, item = tower("user"), tower("item")
    plain = not config.readout.normalise
    usual = 1 / config.loss.temperature
    loss = find("losses", config.loss.recommendation)
    scale = getattr(loss, FIRST_SCALE, usual) if plain else usual
    # engines need a trainable parameter; with a scale alone, no step is taken
    nothing_else = not variant.lora and not trained_parameters(nn.ModuleList([user, item]))
    return RaRec(backbone, user, item, scale=scale, learn_scale=not plain or nothing_else)


def _slot_shape(config: RunConfig, name: str, side: str, shapes: Mapping[str, SourceShape]) -> SlotShape:
    """Return the shape of a source, or of its slots at titles."""
    source = name.removesuffix(AT_TITLES)
    if source != name:
        return SlotShape(config.prompt.max_history, shapes[source].dim, at_titles=True)
    return shapes[source].side(side)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name: alignment, heads, scale, LoRA; nothing of the frozen model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_size(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter, also of one that is packed, or that ZeRO-3 has left empty."""
    packed = getattr(parameter, "quant_state", None)  # of bitsandbytes: two weights of four bits in a byte
    return int(packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel()))


def aligned_blocks(config: RunConfig, variant: Variant, count: int) -> tuple[int, ...]:
    """Return the blocks that get slots in a variant, of a model with `count` blocks.

    Raises:
        UserError: `train.blocks` names a block that the model lacks.
    """
    if variant.blocks in ("none", "readout"):
        return ()
    if variant.blocks == "input":
        return (0,)
    named = config.train.blocks
    return _known_blocks("train.blocks", range(count) if named is None else named, count)


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
    state = alignment_state(model, trained)
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
    if _has_lora(model):
        model.backbone.model.save_pretrained(directory / LORA, safe_serialization=True, state_dict=lora or None)


def load_weights(model: RaRec, directory: Path, weights: Mapping[str, Weights] | None = None) -> None:
    """Load what `save_weights` wrote into a model of the same shape.

    Args:
        model: to load into.
        directory: that was written to.
        weights: the tensors of its files by their names, if they were read already.

    Raises:
        UserError: a file is missing or damaged, or has other tensors than this model.
    """
    files = weights or {}
    state = files.get(ALIGNMENT) or _read(directory / ALIGNMENT)
    _check_shapes(state, alignment_state(model), directory / ALIGNMENT)
    model.load_state_dict(state, strict=False)
    if _has_lora(model):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        lora = files.get(LORA_WEIGHTS) or _read(directory / LORA_WEIGHTS)
        _check_shapes(lora, get_peft_model_state_dict(model.backbone.model), directory / LORA_WEIGHTS)
        set_peft_model_state_dict(model.backbone.model, lora)


def _has_lora(model: RaRec) -> bool:
    return hasattr(model.backbone.model, "peft_config")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}", "train again, or use an earlier checkpoint") from None


def _check_shapes(state: Weights, expected: Weights, path: Path) -> None:
    own, others = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (state, expected))
    differing = [name for name in sorted({*own, *others}) if own.get(name) != others.get(name)]
    if differing:
        name = differing[0]
        problem = f"tensor {name} is {own.get(name, 'missing')}, but in this model {others.get(name, 'missing')}"
        raise UserError(f"{path}: {problem}", "use the configuration that the file was trained with")
