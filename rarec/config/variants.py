"""The variants of the method, trained with one budget and compared (docs/method.md, section 7)."""

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from rarec.config.registry import find

_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
_ROW = re.compile(r"[^+/]+(\+id)?(\+cheap)?")
NO_VARIANTS = ("id_only", "popularity", "cheap")
"""Rows of the results that are no variants: the ID model, popularity, and all that needs no training."""


@dataclass(frozen=True)
class Variant:
    """One variant of the method.

    Attributes:
        name: its name in directories and in results: letters, digits, `_` and `-`.
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

    @property
    def identity(self) -> str | dict[str, Any]:
        """Return what manifests record: the name of a variant of rarec's; of a user's own, all fields but the title."""
        if VARIANTS.get(self.name) == self:
            return self.name
        return {field: value for field, value in asdict(self).items() if field != "title"}


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("text_only", "text only", "none", instructions=False, projections=False),
        Variant("text_lora", "text only + LoRA", "none", instructions=False, projections=False, lora=True),
        Variant("prefix_only", "prefix only", "all", projections=False),
        Variant("readout", "ID vectors at the readout", "readout", instructions=False),
        Variant("input", "input injection", "input"),
        Variant("input_lora", "input injection + LoRA", "input", lora=True),
        Variant("per_layer", "RA-Rec (per layer)", "all"),
        Variant("per_layer_lora", "RA-Rec + LoRA", "all", lora=True),
    )
}
"""The variants that rarec brings, by name."""
_TITLES = {name: variant.title for name, variant in VARIANTS.items()}


def variant_of(given: str) -> Variant:
    """Return the variant that an entry of `train.variants` names: one above, or one of the user's own.

    Raises:
        ValueError: there is none, or its name cannot be used.
    """
    if given in VARIANTS:
        return VARIANTS[given]
    variant = cast(Variant, find("variants", given, VARIANTS))
    check_own_name(given, variant.name, (*VARIANTS, *NO_VARIANTS))
    _TITLES[variant.name] = variant.title
    return variant


def check_own_name(given: str, name: str, taken: Collection[str]) -> None:
    """Refuse a name of a part of the user's own that cannot be a row or a folder of the results.

    Raises:
        ValueError: it has other characters, or is taken.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{given} has the name {name!r}: use letters, digits, _ and -, at most 40")
    if name in taken:
        raise ValueError(f"{given} has the name {name!r}, which is taken: give it another one")


def check_variant(given: str) -> str:
    """Validate an entry of `train.variants`, and return it."""
    variant_of(given)
    return given


def check_row(given: str) -> str:
    """Validate the name of a row of the results, and return it."""
    if not _ROW.fullmatch(given):
        raise ValueError(f"{given!r} is no row of the results: write a variant, alone or with +id or +id+cheap")
    return given


def variant_titles() -> Mapping[str, str]:
    """Return the titles of all variants that this process has met, by name."""
    return _TITLES
