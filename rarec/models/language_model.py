"""Load the frozen language model with its tokenizer, and add LoRA weights through PEFT.

Shape letters: B batch, H heads, G heads of keys and values, T positions, C size of a head.
"""

import copy
import importlib.util
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.import_utils import is_flash_attn_2_available

from rarec.config.method import Llm, Lora
from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone, Pool, config_hash, fingerprint
from rarec.models.model_folder import check_folder, check_tokenizer, locate, read_model, read_with
from rarec.prompts import TextTokenizer

DEFAULT_CONTEXT_LENGTH = 512
PACKABLE = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
"""Values of `model_type` of the decoders that keep packed prompts apart; each has a test."""
SDPA_FLOAT32 = "sdpa_float32"
"""Name of the attention that `use_float32_attention` sets, in transformers' registry."""
_QUERY_AND_VALUE = (
    ["q_proj", "v_proj"],
    ["query", "value"],
    ["c_attn"],
    ["q_lin", "v_lin"],
    ["q", "v"],
    ["query_key_value"],
    ["qkv_proj"],
    ["Wqkv"],
)
"""Names of the query and value projections, by architecture."""


@dataclass(frozen=True)
class LoadedModel:
    """A loaded language model and what identifies it.

    Attributes:
        backbone: the frozen model, with LoRA weights if the variant has them.
        tokenizer: the tokenizer of the prompts.
        context_length: the longest prompt, in tokens.
        identity: name, revision, dtype, sha256 of the configuration and a fingerprint of the weights, for manifests.
    """

    backbone: FrozenBackbone
    tokenizer: TextTokenizer
    context_length: int
    identity: dict[str, str]


def load_model(
    config: Llm, converted: Path, *, pool: Pool = "mean", lora: Lora | None = None, device: str = "cpu"
) -> LoadedModel:
    """Load a frozen language model and its tokenizer. Code that comes with a model is never run.

    Args:
        config: the section `llm`.
        converted: directory for the conversion of a GGUF file.
        pool: `readout.pool`.
        lora: add LoRA weights through PEFT, for others to be loaded into.
        device: type of the device that the model will run on.

    Raises:
        UserError: the model cannot be found or read, lacks weights, or is neither an encoder nor a decoder.
    """
    path = locate(config.path, converted)
    if Path(path).is_dir():
        check_folder(Path(path), config.allow_pickle_weights)
    settings = read_with(AutoConfig, config.path, path, revision=config.revision)
    kind = kind_of(settings, config)
    model = _load_trunk(config, path, kind)
    if device == "cpu" and config.attention == "auto":
        use_float32_attention(model)
    context_length = context_length_of(model)
    decodes = kind == "decoder"
    words = read_with(AutoTokenizer, config.path, path, revision=config.revision)
    tokenizer = TextTokenizer(words, opens=decodes)
    around = {*tokenizer.prefix.tolist(), *tokenizer.suffix.tolist(), tokenizer.filler}
    rows = model.get_input_embeddings().num_embeddings  # ZeRO-3 leaves an empty tensor in the place of the weight
    check_tokenizer(words, around, rows, config.path)
    backbone = FrozenBackbone(model, pool, config.gradient_checkpointing, decodes, config.packing).eval()
    if config.compile:
        compile_blocks(backbone)
    identity = {
        "name": config.path,
        "revision": getattr(settings, "_commit_hash", None) or config.revision or "local",
        "kind": kind,
        "dtype": config.dtype,
        "quantize": config.quantize,
        "config_sha256": config_hash(settings),
        "fingerprint": fingerprint(backbone.trunk, model.config),
        "tokenizer": tokenizer.fingerprint,
    }
    loaded = LoadedModel(backbone, tokenizer, context_length, identity)
    return with_adapter(loaded, lora, seed=0) if lora is not None else loaded


def compile_blocks(backbone: FrozenBackbone) -> None:
    """Compile each block: all are alike, so that one compilation serves them all. Slots are set before it, by hooks."""
    for block in backbone.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def with_adapter(loaded: LoadedModel, lora: Lora | None, seed: int) -> LoadedModel:
    """Return the same language model with new LoRA weights in place of its present ones, or with none.

    The frozen weights are shared with `loaded`, not copied.

    Raises:
        UserError: the adapters do not fit the architecture.
    """
    model = loaded.backbone.model
    model = model.unload() if hasattr(model, "peft_config") else model
    return replace(loaded, backbone=_like(loaded, with_lora(model, lora, seed) if lora is not None else model))


def without_adapter(loaded: LoadedModel) -> LoadedModel:
    """Return the language model without LoRA weights; it shares the frozen ones, and may run beside `loaded`."""
    model = loaded.backbone.model
    if not hasattr(model, "peft_config"):
        return loaded
    apart = copy.deepcopy(model, {id(part): part for part in (*model.parameters(), *model.buffers())})
    return replace(loaded, backbone=_like(loaded, apart.unload()))


def _like(loaded: LoadedModel, model: Any) -> FrozenBackbone:
    """Return another model that is frozen, and read, as one is."""
    known = loaded.backbone
    return FrozenBackbone(model, known.pool, known.recomputes, known.sink, known.packs).eval()


def with_lora(model: Any, config: Lora, seed: int) -> Any:
    """Wrap a model in PEFT. The adapter's weights are float32, also over a bfloat16 model.

    Raises:
        UserError: the adapters do not fit the architecture.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = config.targets or _query_and_value(model)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        exclude_modules=_poolers(model, targets) or None,
        bias="none",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT uses a name that transformers deprecates
            adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"lora.targets: {error}", "name linear modules of this architecture") from None
    own = adapted.peft_config["default"]
    for name in ("target_modules", "exclude_modules"):  # sets, which Python orders anew in each process
        setattr(own, name, sorted(getattr(own, name) or []) or None)
    return adapted


def headless(model: Any) -> Any:
    """Remove the language modelling head: no logits are computed here, and the head of an 8B model is a gigabyte."""
    trunk = getattr(model, model.base_model_prefix, model)
    for name, part in model.named_children():
        if trunk is not model and part is not trunk:
            setattr(model, name, None)
    return model


def context_length_of(model: Any) -> int:
    """Return the longest input in tokens; 512 if the model does not say.

    Positions that RoBERTa and its relatives reserve for padding do not count.
    """
    tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    reserved = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    positions = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT_LENGTH
    return int(positions) - max(reserved, default=0)


def kind_of(settings: Any, config: Llm) -> str:
    """Return `encoder` for an architecture with a masked-LM form, `decoder` for one with a causal form only.

    Args:
        settings: the model's own configuration.
        config: the section `llm`, which may name the kind.

    Raises:
        UserError: it has neither form; or prompts are packed, and the model would let them see each other.
    """
    architecture = f"{config.path!r} is a {settings.model_type} model"
    if config.packing and settings.model_type not in PACKABLE:
        problem = f"llm.packing: {architecture}, which is not known to keep packed prompts apart"
        raise UserError(problem, f"leave llm.packing out, or choose one of {', '.join(PACKABLE)}")
    if config.kind != "auto":
        return config.kind
    if not getattr(settings, "is_encoder_decoder", False):
        if settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return "encoder"
        if settings.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "decoder"
    remedy = "set llm.kind to decoder or encoder if it can serve as one"
    raise UserError(f"llm.path: {architecture}, neither a causal decoder nor a masked encoder", remedy)


def _load_trunk(config: Llm, path: str, kind: str) -> Any:
    """Load the transformer in evaluation mode, without its head."""
    keywords: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "revision": config.revision}
    if config.attention != "auto":
        keywords["attn_implementation"] = _attention(config)
    if config.quantize != "none":
        keywords["quantization_config"] = _quantisation(config)
    if not config.allow_pickle_weights:
        keywords["use_safetensors"] = True
    loader = AutoModelForCausalLM if kind == "decoder" else AutoModel
    model = headless(read_model(loader, config.path, path, **keywords)[0])
    _keep_unpacked(model)
    return model


def _attention(config: Llm) -> str:
    if config.attention == "flash_attention_2" and not is_flash_attn_2_available():
        # transformers would fetch a kernel from a hub, and run it
        problem = "llm.attention: flash_attention_2 needs a GPU and the package flash-attn"
        raise UserError(problem, "pip install flash-attn, or set llm.attention: sdpa")
    return config.attention


def _keep_unpacked(model: Any) -> None:
    """Stop bitsandbytes from repacking weights at the first pass without gradients: no gradient passes through those.

    It does so on CPUs with AVX-512 for bfloat16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantisation(config: Llm) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        problem = f"llm.quantize: {config.quantize} needs the package bitsandbytes"
        raise UserError(problem, "pip install 'rarec[qlora]', or set llm.quantize: none")
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, config.dtype)
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": config.quantize, "bnb_4bit_compute_dtype": compute}
    return BitsAndBytesConfig(**kind)


def _poolers(model: Any, targets: list[str]) -> list[str]:
    """Return the targets that belong to a pooler behind the last block: no readout here uses one."""
    names = (name for name, _ in model.named_modules() if "pooler" in name.split("."))
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]


def _query_and_value(model: Any) -> list[str]:
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    pair = next((pair for pair in _QUERY_AND_VALUE if names.issuperset(pair)), None)
    if pair is None:
        problem = "lora.targets: the query and value projections of this architecture are not known"
        raise UserError(problem, "name its linear modules in lora.targets")
    return pair


def use_float32_attention(model: Any) -> None:
    """Compute the fused attention of a bfloat16 model in float32; for models on a CPU.

    There the backward pass of torch's fused attention is much slower in bfloat16 than in float32, most of all for short
    prompts; the casts cost little. Other models are left as they are.
    """
    if model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(SDPA_FLOAT32)


def _sdpa_in_float32(
    module: nn.Module,
    queries_BHTC: Tensor,
    keys_BGTC: Tensor,
    values_BGTC: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    out_BTHC, _ = sdpa_attention_forward(
        module, queries_BHTC.float(), keys_BGTC.float(), values_BGTC.float(), attention_mask, **settings
    )
    return out_BTHC.to(queries_BHTC.dtype), None


AttentionInterface.register(SDPA_FLOAT32, _sdpa_in_float32)
AttentionMaskInterface.register(SDPA_FLOAT32, sdpa_mask)
