"""Build a variant's model on the meta device, from the language model's config.json alone, and list its parameters.

Attention calls PyTorch's fused operations by name: on the meta device `scaled_dot_product_attention` would take the
plain one, and which kernel a GPU would choose cannot be asked without one. For the backward pass a fused kernel saves
queries, keys, values, the output, and the log of the softmax's sum for each head and token (Dao et al., FlashAttention,
2022).

Shape letters: B batch, H heads, G heads of keys and values, T positions, C size of a head.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, AutoModelForCausalLM

from rarec.config import RunConfig, Variant
from rarec.config.shipped import resolve_path
from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone
from rarec.models.build import SIDES, SourceShape, build_model
from rarec.models.language_model import LoadedModel, context_length_of, headless, kind_of, with_adapter
from rarec.models.model_folder import check_settings, read_with
from rarec.models.towers import RaRec
from rarec.prompts import TextTokenizer, slot_names

META = torch.device("meta")
NF4_BYTES = 0.5 + 4 / 64
"""Bytes of a 4-bit weight: one float32 scale for every 64 weights, the default block of bitsandbytes."""
MASKED, UNMASKED = "meta_masked", "meta_unmasked"
"""Names under which transformers calls the attention below: with a mask as `sdpa`, without as `flash_attention_2`."""
_ATTENTION = {"eager": "eager", "flash_attention_2": UNMASKED}


@dataclass(frozen=True)
class Weight:
    """Shape and role of a parameter.

    Attributes:
        name: name in the model.
        shape: shape before any sharding.
        element_bytes: bytes of an element.
        trainable: whether it is trained.
        linear: whether it is the matrix of a frozen linear layer.
        block: index of the language model's block that holds it; None outside the blocks.
        in_llm: whether it belongs to the language model.
    """

    name: str
    shape: tuple[int, ...]
    element_bytes: float
    trainable: bool
    linear: bool
    block: int | None
    in_llm: bool

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """The bytes of all elements."""
        return round(self.numel * self.element_bytes)


class MetaModel:
    """A variant's model on the meta device, and the list of its parameters.

    Args:
        model: model on the meta device.
        nf4: whether the frozen linear layers are quantized to 4 bits.

    Attributes:
        recomputes: whether blocks are recomputed in the backward pass.
        weights: all parameters, each once.
        frozen: the frozen ones, including a logit scale that is not trained.
        trainable: the trainable ones: alignment, heads, logit scale, LoRA.
    """

    def __init__(self, model: RaRec, nf4: bool) -> None:
        self.model, self.nf4 = model, nf4
        self.recomputes = model.backbone.recomputes
        self.weights = list(self._weights())
        self.frozen = [weight for weight in self.weights if not weight.trainable]
        self.trainable = [weight for weight in self.weights if weight.trainable]

    @property
    def buffer_bytes(self) -> int:
        """The bytes of buffers that are computed before the first step: whitening, scales of the blocks."""
        towers = (self.model.user, self.model.item)
        return sum(buffer.numel() * buffer.element_size() for tower in towers for buffer in tower.buffers())

    @property
    def block_numel(self) -> int:
        """The number of weights in the language model's blocks, with LoRA: the N of 4N operations per token."""
        return sum(weight.numel for weight in self.weights if weight.block is not None)

    @property
    def first_grad_block(self) -> int | None:
        """The first block that gradients pass through; None where they end before the language model."""
        if any(weight.block is not None for weight in self.trainable):
            return 0
        return min((*self.model.user.alignment_blocks, *self.model.item.alignment_blocks), default=None)

    @property
    def grad_path(self) -> list[Weight]:
        """The frozen weights of the blocks that gradients pass through."""
        first = self.first_grad_block
        return [w for w in self.frozen if first is not None and w.block is not None and w.block >= first]

    @property
    def file_bytes(self) -> dict[str, int]:
        """The bytes of tensors in `alignment.safetensors` and in the adapter's file, without the files' headers."""
        own = [*self.model.user.state_dict().values(), *self.model.item.state_dict().values()]
        own += list(self.model.parameters(recurse=False))
        lora = sum(weight.nbytes for weight in self.trainable if "lora_" in weight.name)
        return {"alignment": sum(tensor.numel() * tensor.element_size() for tensor in own), "lora": lora}

    def bundle_bytes(self, dtype: str) -> int:
        """Return the bytes of a bundle's tensors, with trained weights written in this dtype."""
        halved = sum(weight.nbytes // 2 for weight in self.trainable if "lora_" not in weight.name)
        return sum(self.file_bytes.values()) - (halved if dtype == "float16" else 0)

    def _weights(self) -> Iterator[Weight]:
        backbone = self.model.backbone
        blocks = {id(p): index for index, block in enumerate(backbone.blocks) for p in block.parameters()}
        llm = {id(p) for p in backbone.trunk.parameters()}
        linear = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Linear)}
        for name, p in self.model.named_parameters():
            matrix = id(p) in linear and not p.requires_grad
            packed = self.nf4 and matrix and id(p) in llm
            width = NF4_BYTES if packed else p.element_size()
            yield Weight(name, tuple(p.shape), width, p.requires_grad, matrix, blocks.get(id(p)), id(p) in llm)


class MetaModelBuilder:
    """Build the models of a run on the meta device.

    Args:
        config: configuration of the run.
        sources: dimension and vectors per user of every source.
        converted: directory of the converted model, where `llm.path` is a GGUF file; it need not exist.

    Raises:
        UserError: the language model's configuration cannot be found or read, or its prompts cannot be packed.
    """

    def __init__(self, config: RunConfig, sources: Mapping[str, SourceShape], converted: Path) -> None:
        self.config, self.sources = config, sources
        self._llm_config = _read_llm_config(config, converted)
        self._kind = kind_of(self._llm_config, config.llm)

    @cached_property
    def slot_sources(self) -> dict[str, tuple[str, ...]]:
        """The sources whose slots each side's template names."""
        return {side: slot_names(self.config.prompt, side, list(self.sources)) for side in SIDES}

    @cached_property
    def context_length(self) -> int:
        """The language model's context length, in tokens."""
        return context_length_of(self._build_llm())

    def build(self, variant: Variant, gradient_checkpointing: bool) -> MetaModel:
        """Build the model of a variant."""
        with META:
            decodes = self._kind == "decoder"
            pool = self.config.readout.pool
            backbone = FrozenBackbone(self._build_llm(), pool, gradient_checkpointing, decodes).eval()
            loaded = LoadedModel(backbone, cast(TextTokenizer, None), 0, {})  # no text is read here
            loaded = with_adapter(loaded, self.config.lora, self.config.run.seed) if variant.lora else loaded
            model = build_model(self.config, variant, loaded, self.sources, self.slot_sources)
        return MetaModel(model, self.config.llm.quantize == "nf4")

    def _build_llm(self) -> Any:
        """Build the language model without its head, in evaluation mode."""
        llm = self.config.llm
        loader = AutoModelForCausalLM if self._kind == "decoder" else AutoModel
        wanted = _ATTENTION.get(llm.attention, MASKED)
        problem = ""
        for attention in dict.fromkeys((wanted, "eager")):  # older architectures support eager attention alone
            keywords = {"dtype": getattr(torch, llm.dtype), "attn_implementation": attention}
            try:
                with META:
                    return headless(loader.from_config(self._llm_config, **keywords).eval())  # type: ignore[no-untyped-call]
            except (ValueError, KeyError, ImportError) as error:
                problem = str(error).strip().splitlines()[0]
        raise UserError(f"llm.path: cannot build a model from {llm.path!r}: {problem}", "choose another architecture")


def _read_llm_config(config: RunConfig, converted: Path) -> Any:
    """Read the language model's configuration; for a GGUF file that is not converted yet, from its metadata."""
    name = config.llm.path
    path = resolve_path(config.llm.path)
    if path.endswith(".gguf"):
        if (converted / "config.json").is_file():
            return read_with(AutoConfig, name, str(converted))
        if not Path(path).is_file():
            raise UserError(f"llm.path: {path} does not exist", "give the path of a .gguf file")
        return read_with(AutoConfig, name, str(Path(path).parent), gguf_file=Path(path).name)
    if path.startswith((".", "/")) and not (Path(path) / "config.json").is_file():
        remedy = "give the directory of a model; its config.json is enough"
        raise UserError(f"llm.path: {path} contains no config.json", remedy)
    if Path(path).is_dir():
        check_settings(Path(path) / "config.json")
    return read_with(AutoConfig, name, path, revision=config.llm.revision)


def _attend(
    module: nn.Module,
    queries_BHTC: Tensor,
    keys_BGTC: Tensor,
    values_BGTC: Tensor,
    attention_mask: Tensor | None,  # some architectures give it by this name
    **_: Any,
) -> tuple[Tensor, None]:
    """Do what transformers does for `sdpa`: with a mask, repeat keys and values for every head and cast the mask."""
    if attention_mask is None:
        out_BHTC, *_ = torch.ops.aten._scaled_dot_product_flash_attention(queries_BHTC, keys_BGTC, values_BGTC)
        return out_BHTC.transpose(1, 2), None
    groups = int(getattr(module, "num_key_value_groups", 1))
    keys_BHTC, values_BHTC = (side.repeat_interleave(groups, 1) for side in (keys_BGTC, values_BGTC))
    bias_B1TT = torch.empty_like(attention_mask, dtype=queries_BHTC.dtype)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out_BHTC, *_ = efficient(queries_BHTC, keys_BHTC, values_BHTC, bias_B1TT, True)
    return out_BHTC.transpose(1, 2), None


def _mask(*_: Any, attention_mask: Tensor, **__: Any) -> Tensor:
    """Return a mask (B, 1, T, T) as `sdpa` gets it: batches are padded, so there always is one."""
    batch, length = attention_mask.shape
    return attention_mask.new_empty(batch, 1, length, length, dtype=torch.bool)


AttentionInterface.register(MASKED, _attend)
AttentionInterface.register(UNMASKED, _attend)
AttentionMaskInterface.register(MASKED, _mask)
AttentionMaskInterface.register(UNMASKED, lambda *_, **__: None)
