"""Build one variant of the method from the configuration, over a loaded language model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rarec.config import RunConfig, Variant
from rarec.config.registry import find
from rarec.errors import UserError
from rarec.models.alignment import INSTRUCTIONS, AlignmentModule, SlotShape
from rarec.models.language_model import LoadedModel
from rarec.models.towers import IDS, RaRec, Tower
from rarec.prompts import AT_TITLES, slot_names

SIDES = ("user", "item")


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


def slots_reserved(config: RunConfig, shapes: Mapping[str, SourceShape]) -> dict[str, dict[str, int]]:
    """Return the most slots of each source on each side in any variant: truncated prompts leave room for them.

    Those at titles are named by `at_titles`, and are as many as a history may have titles.
    """
    m = config.alignment.instructions
    reserved = {side: {name: m + shape.side(side).vectors for name, shape in shapes.items()} for side in SIDES}
    named = slot_names(config.prompt, "user", list(shapes))
    at = {name: config.prompt.max_history for name in named if name.endswith(AT_TITLES)}
    return {"user": reserved["user"] | at, "item": reserved["item"]}


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
    count, at_readout = len(backbone.blocks), variant.blocks == "readout"
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
        shape = (chosen, mapped, hidden, m, variant.projections)
        alignment = AlignmentModule(*shape, source_class) if useful else None
        reads = alignment.roles if alignment is not None and (config.readout.slots or at_readout) else ()
        if backbone.sink:  # and those of instructions are the same for all users and items
            reads = tuple(role for role in reads if role != INSTRUCTIONS)
        readout = readout_class(hidden, config.readout, reads)
        size = min(hidden, config.readout.size) if config.readout.whiten else hidden
        taught = side == "user" and config.loss.distil_weight > 0
        student = nn.Linear(size, shapes[IDS].dim, bias=False) if taught else None
        return Tower(alignment, readout, slots_from_blocks, student)

    with torch.random.fork_rng(devices=[]):  # for random parameters of the user's own maps and readouts
        torch.manual_seed(config.run.seed)
        user, item = tower("user"), tower("item")
    plain = not config.readout.normalise
    scale = 1.0 if plain and config.loss.recommendation == "bpr" else 1 / config.loss.temperature
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
    chosen = tuple(sorted(set(config.train.blocks))) if config.train.blocks is not None else tuple(range(count))
    if chosen and chosen[-1] >= count:
        raise UserError(f"train.blocks: the model has no block {chosen[-1]}", f"choose from blocks 0 to {count - 1}")
    return chosen
