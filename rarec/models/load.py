"""Loading the language model: a local directory, a hub name, an installed package, or a GGUF file converted once."""

import importlib.util
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from rarec.artefacts import MANIFEST, read_manifest, write_manifest
from rarec.config.method import Llm, Lora
from rarec.errors import UserError
from rarec.files import new_directory, sha256_file
from rarec.models.backbone import FrozenBackbone, Pool, config_hash
from rarec.models.cpu_attention import widen_attention
from rarec.models.lora import with_lora
from rarec.paths import resolve
from rarec.prompts import TextTokenizer

_REMEDY = "give a local directory, a hub name, package:NAME/DIR or a .gguf file; it must hold the whole model"


@dataclass(frozen=True)
class LoadedModel:
    """A language model ready for use, and what identifies it.

    Attributes:
        backbone: frozen, with LoRA weights where asked for.
        tokenizer: for the prompts.
        context_length: in tokens.
        identity: name, revision, dtype, sha256 of the configuration and a fingerprint of the weights, for manifests.
    """

    backbone: FrozenBackbone
    tokenizer: TextTokenizer
    context_length: int
    identity: dict[str, str]


def convert(config: Llm, converted: Path) -> None:
    """Make what loading needs: a GGUF file becomes a plain model directory, once. One rank does it for all.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    _locate(config.path, converted)


def load_model(
    config: Llm,
    converted: Path,
    *,
    pool: Pool = "mean",
    lora: Lora | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> LoadedModel:
    """Load a frozen language model and its tokenizer. No code that comes with a model is ever run.

    Args:
        config: the section `llm`.
        converted: where a GGUF file is saved as a plain model directory, once.
        pool: the section `readout`'s choice.
        lora: adds fresh LoRA weights, through PEFT.
        seed: of the LoRA weights.
        device: the kind on which it will compute.

    Raises:
        UserError: the model cannot be found or read, lacks weights, or is neither an encoder nor a decoder.
    """
    path = _locate(config.path, converted)
    settings = read_with(AutoConfig, config.path, path, revision=config.revision)
    kind = config.kind if config.kind != "auto" else kind_of(settings, config.path)
    keywords: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "revision": config.revision}
    if config.attention != "auto":
        keywords["attn_implementation"] = config.attention
    if config.quantize != "none":
        keywords["quantization_config"] = _quantisation(config)
    loader = AutoModelForCausalLM if kind == "decoder" else AutoModel
    model, told = read_with(loader, config.path, path, output_loading_info=True, **keywords)
    _check_complete(model.eval(), told["missing_keys"], config.path)
    model = headless(model)
    _keep_unpacked(model)
    if device == "cpu" and config.attention == "auto":
        widen_attention(model)
    context_length = context_length_of(model)
    decodes = kind == "decoder"
    tokenizer = TextTokenizer(read_with(AutoTokenizer, config.path, path, revision=config.revision), opens=decodes)
    backbone = FrozenBackbone(model, pool, config.gradient_checkpointing, sink=decodes).eval()
    identity = {
        "name": config.path,
        "revision": getattr(settings, "_commit_hash", None) or config.revision or "local",
        "kind": kind,
        "dtype": config.dtype,
        "quantize": config.quantize,
        "config_sha256": config_hash(settings),
        "fingerprint": backbone.fingerprint(),
        "tokenizer": tokenizer.fingerprint,
    }
    loaded = LoadedModel(backbone, tokenizer, context_length, identity)
    return with_adapter(loaded, lora, seed) if lora is not None else loaded


def headless(model: Any) -> Any:
    """The same model without its language modelling head: no logits are computed, and of an 8B it is a gigabyte."""
    trunk = getattr(model, model.base_model_prefix, model)
    for name, part in model.named_children():
        if trunk is not model and part is not trunk:
            setattr(model, name, None)
    return model


def with_adapter(loaded: LoadedModel, lora: Lora | None, seed: int) -> LoadedModel:
    """The same language model with fresh LoRA weights in place of those it wears, or with none. No weight is copied.

    Raises:
        UserError: the adapters do not fit the architecture.
    """
    adapted = loaded.backbone
    model = adapted.model.unload() if hasattr(adapted.model, "peft_config") else adapted.model
    model = with_lora(model, lora, seed) if lora is not None else model
    return replace(loaded, backbone=FrozenBackbone(model, adapted.pool, adapted.recomputes, adapted.sink).eval())


def _keep_unpacked(model: Any) -> None:
    """At a first pass without gradients bitsandbytes packs weights for some CPUs so that no gradient comes through."""
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


def _locate(name: str, converted: Path) -> str:
    """A local directory or a hub name."""
    path = resolve(name)
    if path.endswith(".gguf"):
        return str(_convert_gguf(Path(path), converted))
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"llm.path: {path} is no directory", _REMEDY)
    return path


def read_with(loader: Any, name: str, path: str, **keywords: Any) -> Any:
    """What one of transformers' loaders reads; no code that comes with a model is run.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **keywords)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"llm.path: cannot load {name!r}: {first_line}", _REMEDY) from None


def _check_complete(model: Any, missing: Iterable[str], name: str) -> None:
    """Transformers makes absent weights up at random; harmless only in what is idle: heads and a pooler."""
    trunk = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    absent = sorted(key for key in missing if key.startswith(trunk) and "pooler." not in key)
    if absent:
        raise UserError(f"llm.path: {name!r} lacks {len(absent)} weights, {absent[0]} first", "get the whole model")


def context_length_of(model: Any) -> int:
    """In tokens; 512 where the model does not say. Positions that RoBERTa's kin keep for padding are none."""
    tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    kept = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return (getattr(model.config, "max_position_embeddings", None) or 512) - max(kept, default=0)


def kind_of(settings: Any, name: str) -> str:
    """Causal-only architectures are decoders; those with a masked-LM form are encoders."""
    if not getattr(settings, "is_encoder_decoder", False):
        if settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return "encoder"
        if settings.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "decoder"
    raise UserError(
        f"llm.path: {name!r} is a {settings.model_type} model, neither a causal decoder nor a masked encoder",
        "set llm.kind to decoder or encoder if it can serve as one",
    )


def _convert_gguf(file: Path, directory: Path) -> Path:
    """Dequantise a GGUF file through transformers and save it as a plain model directory, once for each content."""
    if not file.is_file():
        raise UserError(f"llm.path: {file} does not exist", "give the path of a .gguf file")
    made_from = {"gguf": sha256_file(file)}
    if (directory / MANIFEST).exists() and read_manifest(directory, "llm")["made_from"] == made_from:
        return directory
    from transformers import GgufConfig

    place, name = str(file.parent), file.name
    with warnings.catch_warnings(), new_directory(directory) as aside:
        warnings.simplefilter("ignore")
        quantised = GgufConfig(gguf_file=name, dequantize=True)
        keywords = {"gguf_file": name, "quantization_config": quantised, "dtype": torch.bfloat16}
        read_with(AutoModelForCausalLM, str(file), place, **keywords).save_pretrained(aside)
        read_with(AutoTokenizer, str(file), place, gguf_file=name).save_pretrained(aside)
        write_manifest(aside, "llm", settings={}, made_from=made_from)
    return directory
