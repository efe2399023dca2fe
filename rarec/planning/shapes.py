"""An arm's model on the meta device: the towers that training builds, with shapes and without weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rarec.config import Arm, RunConfig
from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone, Pool
from rarec.models.build import SIDES, SourceShape, build_model
from rarec.models.load import LoadedModel, _context_length, _kind, _read, wear
from rarec.models.towers import RaRec
from rarec.paths import resolve
from rarec.planning.attention import PADDED, UNPADDED
from rarec.prompts import TextTokenizer
from rarec.prompts.hybrid import parse_template

META = torch.device("meta")
NF4_BYTES = 0.5 + 4 / 64
"""Of a weight in 4 bits: with one float32 for every 64 of them, bitsandbytes' default block."""
_ATTENTION = {"eager": "eager", "flash_attention_2": UNPADDED}


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        name: in the model; of one that is tied, the first of its names.
        shape: whole.
        width: bytes of an element.
        trains: whether it does.
        linear: whether it is the matrix of a frozen linear layer.
        block: of the language model; None outside the blocks.
        in_trunk: whether it belongs to the language model without its head.
        tied: whether another module of the language model has it too.
    """

    name: str
    shape: tuple[int, ...]
    width: float
    trains: bool
    linear: bool
    block: int | None
    in_trunk: bool
    tied: bool

    @property
    def count(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Whole."""
        return round(self.count * self.width)


class ArmShapes:
    """An arm's model, and every weight of it.

    Args:
        model: on the meta device.
        nf4: whether the frozen linear layers will be in 4 bits.
    """

    def __init__(self, model: RaRec, nf4: bool) -> None:
        self.model, self.nf4 = model, nf4

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every parameter once."""
        return tuple(self._weights())

    @property
    def frozen(self) -> list[Weight]:
        """Those that do not train, a scale that stays as it is among them."""
        return [weight for weight in self.weights if not weight.trains]

    @property
    def trained(self) -> list[Weight]:
        """Alignment, heads, scale, alpha, LoRA."""
        return [weight for weight in self.weights if weight.trains]

    @property
    def in_blocks(self) -> int:
        """Weights in the language model's blocks, LoRA among them: the N of 4N."""
        return sum(weight.count for weight in self.weights if weight.block is not None)

    @property
    def steps(self) -> bool:
        """Whether training takes any: none where a scale alone trains."""
        return any(weight.name != "log_scale" for weight in self.trained)

    @property
    def first_block(self) -> int | None:
        """The first block through which gradients flow; None where they end before the language model."""
        if any(weight.block is not None for weight in self.trained):
            return 0
        return min((*self.model.user.alignment_blocks, *self.model.item.alignment_blocks), default=None)

    @property
    def saved(self) -> dict[str, int]:
        """Bytes in `alignment.safetensors` and in the adapter's file, without their headers."""
        own = [*self.model.user.state_dict().values(), *self.model.item.state_dict().values()]
        own += list(self.model.parameters(recurse=False))
        lora = sum(weight.bytes for weight in self.trained if "lora_" in weight.name)
        return {"alignment": sum(tensor.numel() * tensor.element_size() for tensor in own), "lora": lora}

    def _weights(self) -> Iterator[Weight]:
        backbone = self.model.backbone
        blocks = {id(p): at for at, block in enumerate(backbone.blocks) for p in block.parameters()}
        trunk = {id(p) for p in backbone.trunk.parameters()}
        linear = {id(module.weight): name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        owners: dict[int, int] = {}
        for module in backbone.model.modules():
            for own in module.parameters(recurse=False):
                owners[id(own)] = owners.get(id(own), 0) + 1
        for name, p in self.model.named_parameters():
            matrix = id(p) in linear and not p.requires_grad
            packed = self.nf4 and matrix and id(p) in trunk  # a head stays as it is
            width = NF4_BYTES if packed else p.element_size()
            yield Weight(
                name, tuple(p.shape), width, p.requires_grad, matrix, blocks.get(id(p)), id(p) in trunk,
                owners.get(id(p), 0) > 1,
            )  # fmt: skip


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
        self._kind = config.llm.kind if config.llm.kind != "auto" else _kind(self._settings, config.llm.path)

    @cached_property
    def named(self) -> dict[str, tuple[str, ...]]:
        """The sources whose slots each side's template names."""
        return {side: self._named(side) for side in SIDES}

    @cached_property
    def context_length(self) -> int:
        """Of the language model, in tokens."""
        return _context_length(self._bare())

    def arm(self, arm: Arm, gradient_checkpointing: bool) -> ArmShapes:
        """An arm's model."""
        pool = self.config.readout.pool
        pooling = cast(Pool, pool) if pool != "auto" else ("last" if self._kind == "decoder" else "mean")
        with META:
            backbone = FrozenBackbone(self._bare(), pooling, gradient_checkpointing).eval()
            loaded = LoadedModel(backbone, cast(TextTokenizer, None), 0, {})  # no text is read here
            loaded = wear(loaded, self.config.lora, self.config.run.seed) if arm.lora else loaded
            model = build_model(self.config, arm, loaded, self.sources, self.named)
        return ArmShapes(model, self.config.llm.quantize == "nf4")

    def _bare(self) -> Any:
        """The language model as it is loaded, in evaluation mode."""
        llm, loader = self.config.llm, AutoModelForCausalLM if self._kind == "decoder" else AutoModel
        wanted = _ATTENTION.get(llm.attention, PADDED)
        for attention in dict.fromkeys((wanted, "eager")):  # older architectures know eager attention alone
            try:
                with META:
                    return loader.from_config(
                        self._settings, dtype=getattr(torch, llm.dtype), attn_implementation=attention
                    ).eval()
            except (ValueError, KeyError, ImportError, AttributeError) as error:
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
            return _read(AutoConfig, name, str(converted))
        if not path.is_file():
            raise UserError(f"llm.path: {path} does not exist", "give the path of a .gguf file")
        return _read(AutoConfig, name, str(path.parent), gguf_file=path.name)
    if resolve(name).startswith((".", "/")) and not (path / "config.json").is_file():
        raise UserError(f"llm.path: {path} holds no config.json", "give the directory of a model; its weights may wait")
    return _read(AutoConfig, name, resolve(name), revision=config.llm.revision)
