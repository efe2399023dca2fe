"""Variants: the variants of the method that are trained at one budget and compared (docs/method.md, section 7)."""

from dataclasses import dataclass
from typing import Literal

VariantName = Literal["text_only", "prefix_only", "readout", "input", "per_layer", "per_layer_lora"]


@dataclass(frozen=True)
class Variant:
    """What a variant puts into the frozen model.

    Attributes:
        name: as in the configuration, the directories and the report.
        title: for people.
        blocks: which blocks get slots: all that the configuration names, only the input, or none; or whether they
            enter beside the text at the readout alone.
        instructions: whether the slots hold the contextual instructions c.
        projections: whether the slots hold the projected vectors p = W e + b.
        lora: whether LoRA weights train beside.
    """

    name: str
    title: str
    blocks: Literal["all", "input", "readout", "none"]
    instructions: bool = True
    projections: bool = True
    lora: bool = False


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("text_only", "text only", "none", instructions=False, projections=False),
        Variant("prefix_only", "prefix only", "all", projections=False),
        Variant("readout", "ID vectors at the readout", "readout", instructions=False),
        Variant("input", "input injection", "input"),
        Variant("per_layer", "RA-Rec (per layer)", "all"),
        Variant("per_layer_lora", "RA-Rec + LoRA", "all", lora=True),
    )
}
