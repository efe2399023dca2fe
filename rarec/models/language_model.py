"""Load the frozen language model: a local directory, a hub name, an installed package, or a GGUF file converted once.

LoRA weights are added through PEFT.
"""

import importlib.util
import logging
import re
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils.logging import disable_progress_bar

from rarec.config.method import Llm, Lora
from rarec.config.paths import resolve
from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone, Pool, config_hash
from rarec.models.llm_attention import use_float32_attention
from rarec.models.model_folder import check_folder, check_loaded, check_tokenizer
from rarec.models.packing import check_packable
from rarec.prompts import TextTokenizer
from rarec.storage.artefacts import MANIFEST, read_manifest, write_manifest
from rarec.storage.directories import new_directory
from rarec.storage.files import sha256_file

DEFAULT_CONTEXT_LENGTH = 512
_COPIED = (".json", ".safetensors", ".txt", ".model")
_REMEDY = "give a local directory, a hub name, package:NAME/DIR or a .gguf file; it must hold the whole model"
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


def convert(config: Llm, converted: Path) -> None:
    """Convert a GGUF file to a plain model directory, once; other models need no conversion. Call on one rank only.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    _locate(config.path, converted)


def copy_model(config: Llm, converted: Path, to: Path) -> None:
    """Copy the files of a language model: its configuration, weights in safetensors, and tokenizer.

    Args:
        config: the section `llm`.
        converted: see `load_model`.
        to: folder to make.

    Raises:
        UserError: its weights are not in safetensors.
    """
    path = _locate(config.path, converted)
    if not Path(path).is_dir():
        from huggingface_hub import snapshot_download

        path = snapshot_download(path, revision=config.revision, local_files_only=True)
    files = [file for file in sorted(Path(path).iterdir()) if file.suffix in _COPIED and file.name != MANIFEST]
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"llm.path: {path} has no weights in safetensors", "export without export.with_llm")
    to.mkdir()
    for file in files:
        if not file.name.startswith("."):
            shutil.copyfile(file, to / file.name)


def load_model(
    config: Llm,
    converted: Path,
    *,
    pool: Pool = "mean",
    lora: Lora | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> LoadedModel:
    """Load a frozen language model and its tokenizer. Code that comes with a model is never run.

    Args:
        config: the section `llm`.
        converted: directory for the conversion of a GGUF file.
        pool: `readout.pool`.
        lora: add new LoRA weights, through PEFT.
        seed: seed of the LoRA weights.
        device: type of the device that the model will run on.

    Raises:
        UserError: the model cannot be found or read, lacks weights, or is neither an encoder nor a decoder.
    """
    path = _locate(config.path, converted)
    if Path(path).is_dir():
        check_folder(Path(path), config.allow_pickle_weights)
    settings = read_with(AutoConfig, config.path, path, revision=config.revision)
    kind = config.kind if config.kind != "auto" else kind_of(settings, config.path)
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
    if config.packing:
        check_packable(settings.model_type, config.path)
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
        "fingerprint": backbone.fingerprint(),
        "tokenizer": tokenizer.fingerprint,
    }
    loaded = LoadedModel(backbone, tokenizer, context_length, identity)
    return with_adapter(loaded, lora, seed) if lora is not None else loaded


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
    adapted = loaded.backbone
    model = adapted.model.unload() if hasattr(adapted.model, "peft_config") else adapted.model
    model = with_lora(model, lora, seed) if lora is not None else model
    how = (adapted.pool, adapted.recomputes, adapted.sink, adapted.packs)
    return replace(loaded, backbone=FrozenBackbone(model, *how).eval())


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
            return get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"lora.targets: {error}", "name linear modules of this architecture") from None


def headless(model: Any) -> Any:
    """Remove the language modelling head: no logits are computed here, and the head of an 8B model is a gigabyte."""
    trunk = getattr(model, model.base_model_prefix, model)
    for name, part in model.named_children():
        if trunk is not model and part is not trunk:
            setattr(model, name, None)
    return model


def read_with(loader: Any, name: str, path: str, **keywords: Any) -> Any:
    """Call `from_pretrained` of one of transformers' classes; code that comes with a model is not run.

    Raises:
        UserError: it cannot be read.
    """
    disable_progress_bar()  # of loading here and of saving later: neither is progress of the run
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # its report of a load that is refused here is a line for each weight
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **keywords)
    except MemoryError:
        raise
    except PermissionError as error:
        problem = f"llm.path: {error.filename or name} may not be read by this user"
        raise UserError(problem, "change its permissions: chmod a+r") from None
    except Exception as error:  # every library that reads a part of a model has exceptions of its own
        raise UserError(f"llm.path: cannot load {name!r}: {_reason(error)}", _REMEDY) from None
    finally:
        log.setLevel(level)


def _reason(error: Exception) -> str:
    """Return the first line of a library's message, without advice to switch a protection off."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    if re.search("weights_only|trust_remote_code|pickle", first_line):
        return "its weights are a pickle that holds more than plain tensors, or code; neither is loaded"
    return f"{type(error).__name__}: {first_line}"[:200]


def context_length_of(model: Any) -> int:
    """Return the longest input in tokens; 512 if the model does not say.

    Positions that RoBERTa and its relatives reserve for padding do not count.
    """
    tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    reserved = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    positions = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT_LENGTH
    return int(positions) - max(reserved, default=0)


def kind_of(settings: Any, name: str) -> str:
    """Return `encoder` for an architecture with a masked-LM form, `decoder` for one with a causal form only.

    Raises:
        UserError: it has neither form.
    """
    if not getattr(settings, "is_encoder_decoder", False):
        if settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return "encoder"
        if settings.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "decoder"
    raise UserError(
        f"llm.path: {name!r} is a {settings.model_type} model, neither a causal decoder nor a masked encoder",
        "set llm.kind to decoder or encoder if it can serve as one",
    )


def _load_trunk(config: Llm, path: str, kind: str) -> Any:
    """Load the transformer in evaluation mode, without its head."""
    keywords: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "revision": config.revision}
    if config.attention != "auto":
        keywords["attn_implementation"] = config.attention
    if config.quantize != "none":
        keywords["quantization_config"] = _quantisation(config)
    if not config.allow_pickle_weights:
        keywords["use_safetensors"] = True
    loader = AutoModelForCausalLM if kind == "decoder" else AutoModel
    keywords |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # looked at below, with their names
    model, info = read_with(loader, config.path, path, **keywords)
    check_loaded(model.eval(), info, config.path)
    model = headless(model)
    _keep_unpacked(model)
    return model


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
    found = next((pair for pair in _QUERY_AND_VALUE if names.issuperset(pair)), None)
    if found is None:
        problem = "lora.targets: the query and value projections of this architecture are not known"
        raise UserError(problem, "name its linear modules in lora.targets")
    return found


def _locate(name: str, converted: Path) -> str:
    """Return a local directory or a hub name."""
    path = resolve(name)
    if path.endswith(".gguf"):
        return str(_convert_gguf(Path(path), converted))
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"llm.path: {path} is not a directory", _REMEDY)
    return path


def _convert_gguf(file: Path, directory: Path) -> Path:
    """Dequantise a GGUF file through transformers and save it as a plain model directory, once for each content."""
    if not file.is_file():
        raise UserError(f"llm.path: {file} does not exist", "give the path of a .gguf file")
    made_from = {"gguf": sha256_file(file)}
    with suppress(UserError):  # missing or damaged: it is converted again
        if read_manifest(directory, "llm")["made_from"] == made_from:
            return directory
    from transformers import GgufConfig

    parent, name = str(file.parent), file.name
    with warnings.catch_warnings(), new_directory(directory) as temporary:
        warnings.simplefilter("ignore")
        quantised = GgufConfig(gguf_file=name, dequantize=True)
        keywords = {"gguf_file": name, "quantization_config": quantised, "dtype": torch.bfloat16}
        read_with(AutoModelForCausalLM, str(file), parent, **keywords).save_pretrained(temporary)
        read_with(AutoTokenizer, str(file), parent, gguf_file=name).save_pretrained(temporary)
        write_manifest(temporary, "llm", settings={}, made_from=made_from)
    return directory
