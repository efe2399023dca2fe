"""The variants of the method, trained with one budget and compared (docs/method.md, section 7)."""

from dataclasses import dataclass
from typing import Literal

VariantName = Literal["text_only", "prefix_only", "readout", "input", "per_layer", "per_layer_lora"]


@dataclass(frozen=True)
class Variant:
    """One variant of the method.

    Attributes:
        name: its name in the configuration, in directories and in results.
        title: its name in tables and reports.
        blocks: the blocks that get slots: `all` that `train.blocks` names, the `input` alone, or `none`; with
            `readout`, vectors do not enter the model, but are added to the text at the readout.
        instructions: True if slots hold the contextual instructions c.
        projections: True if slots hold the projected vectors p = W e + b.
        lora: True if LoRA weights are trained as well.
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
