"""Models of a run on the meta device: the towers that training builds, from the language model's config.json alone."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rarec.config import RunConfig, Variant
from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone
from rarec.models.build import SIDES, SourceShape, build_model
from rarec.models.language_model import LoadedModel, context_length_of, headless, kind_of, read_with, with_adapter
from rarec.paths import resolve
from rarec.planning.attention import PADDED, UNPADDED
from rarec.planning.shapes import META, VariantShapes
from rarec.prompts import TextTokenizer
from rarec.prompts.hybrid import parse_template

_ATTENTION = {"eager": "eager", "flash_attention_2": UNPADDED}


class Blueprint:
    """Makes a run's models from the language model's configuration alone.

    Args:
        config: of the run.
        sources: dimension and vectors per user of every source.
        converted: where a GGUF file would be as a plain model directory.

    Raises:
        UserError: the language model's configuration cannot be found or read.
    """

    def __init__(self, config: RunConfig, sources: Mapping[str, SourceShape], converted: Path) -> None:
        self.config, self.sources = config, sources
        self._settings = _settings(config, converted)
        self._kind = config.llm.kind if config.llm.kind != "auto" else kind_of(self._settings, config.llm.path)

    @cached_property
    def named(self) -> dict[str, tuple[str, ...]]:
        """The sources whose slots each side's template names."""
        return {side: self._named(side) for side in SIDES}

    @cached_property
    def context_length(self) -> int:
        """Of the language model, in tokens."""
        return context_length_of(self._bare())

    def variant(self, variant: Variant, gradient_checkpointing: bool) -> VariantShapes:
        """A variant's model."""
        with META:
            decodes = self._kind == "decoder"
            backbone = FrozenBackbone(self._bare(), self.config.readout.pool, gradient_checkpointing, decodes).eval()
            loaded = LoadedModel(backbone, cast(TextTokenizer, None), 0, {})  # no text is read here
            loaded = with_adapter(loaded, self.config.lora, self.config.run.seed) if variant.lora else loaded
            model = build_model(self.config, variant, loaded, self.sources, self.named)
        return VariantShapes(model, self.config.llm.quantize == "nf4")

    def _bare(self) -> Any:
        """The language model as it is loaded, in evaluation mode."""
        llm, loader = self.config.llm, AutoModelForCausalLM if self._kind == "decoder" else AutoModel
        wanted = _ATTENTION.get(llm.attention, PADDED)
        problem = ""
        for attention in dict.fromkeys((wanted, "eager")):  # older architectures know eager attention alone
            keywords = {"dtype": getattr(torch, llm.dtype), "attn_implementation": attention}
            try:
                with META:
                    return headless(loader.from_config(self._settings, **keywords).eval())  # type: ignore[no-untyped-call]
            except (ValueError, KeyError, ImportError) as error:
                problem = str(error).strip().splitlines()[0]
        raise UserError(f"llm.path: cannot lay out {llm.path!r}: {problem}", "choose another architecture")

    def _named(self, side: str) -> tuple[str, ...]:
        fields = {"user": ["history"], "item": ["title", "text"]}[side]
        parts = parse_template(getattr(self.config.prompt, side), fields, list(self.sources), f"prompt.{side}")
        return tuple(part.value for part in parts if part.kind == "soft")


def _settings(config: RunConfig, converted: Path) -> Any:
    """The language model's own configuration. Of a GGUF file that is not converted yet, its metadata are read."""
    name = config.llm.path
    path = Path(resolve(name))
    if path.suffix == ".gguf":
        if (converted / "config.json").is_file():
            return read_with(AutoConfig, name, str(converted))
        if not path.is_file():
            raise UserError(f"llm.path: {path} does not exist", "give the path of a .gguf file")
        return read_with(AutoConfig, name, str(path.parent), gguf_file=path.name)
    if resolve(name).startswith((".", "/")) and not (path / "config.json").is_file():
        raise UserError(f"llm.path: {path} holds no config.json", "give the directory of a model; its weights may wait")
    return read_with(AutoConfig, name, resolve(name), revision=config.llm.revision)
