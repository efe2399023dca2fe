"""Find the files of a language model, convert and copy them, and check them before any of it is loaded, and after.

A library that loads a model fills gaps with random numbers and reads pickles; what is refused here is refused before.
"""

import logging
import re
import shutil
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from rarec.config.method import Llm
from rarec.config.shipped import resolve_path
from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST, read_manifest, write_manifest
from rarec.storage.directories import new_directory
from rarec.storage.files import open_file, read_json, sha256_file

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_SIZE = 1 << 24
"""Largest size in a model's config.json: above any vocabulary, width or context length there is."""
MAX_LAYERS = 2_000
_SIZE = re.compile(r"(size|embeddings|positions|_dim|dim|layers?|heads|_embd|_ctx|n_inner)$")
_COPIED = (".json", ".safetensors", ".txt", ".model")
_REMEDY = "get the whole model again"
_HOW_TO_NAME = "give a local directory, a hub name, package:NAME/DIR or a .gguf file; it must hold the whole model"
T = TypeVar("T")


def locate(name: str, converted: Path) -> str:
    """Return the local directory or the hub name of a model. A GGUF file is converted first, once for each content.

    Args:
        name: `llm.path`.
        converted: directory for the conversion of a GGUF file.

    Raises:
        UserError: there is no such directory or file, or it cannot be read.
    """
    path = resolve_path(name)
    if path.endswith(".gguf"):
        return str(_convert_gguf(Path(path), converted))
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"llm.path: {path} is not a directory", _HOW_TO_NAME)
    return path


def _convert_gguf(file: Path, directory: Path) -> Path:
    """Dequantise a GGUF file through transformers and save it as a plain model directory."""
    if not file.is_file():
        raise UserError(f"llm.path: {file} does not exist", "give the path of a .gguf file")
    made_from = {"gguf": sha256_file(file)}
    with suppress(UserError):  # missing or damaged: it is converted again
        if read_manifest(directory, "llm")["made_from"] == made_from:
            return directory
    from transformers import GgufConfig

    parent = str(file.parent)
    name = file.name
    with warnings.catch_warnings(), new_directory(directory) as temporary:
        warnings.simplefilter("ignore")
        quantised = GgufConfig(gguf_file=name, dequantize=True)
        keywords = {"gguf_file": name, "quantization_config": quantised, "dtype": torch.bfloat16}
        read_with(AutoModelForCausalLM, str(file), parent, **keywords).save_pretrained(temporary)
        read_with(AutoTokenizer, str(file), parent, gguf_file=name).save_pretrained(temporary)
        write_manifest(temporary, "llm", settings={}, made_from=made_from)
    return directory


def copy_model(config: Llm, converted: Path, to: Path) -> None:
    """Copy the files of a language model: its configuration, weights in safetensors, and tokenizer.

    Args:
        config: the section `llm`.
        converted: see `locate`.
        to: folder to make.

    Raises:
        UserError: its weights are not in safetensors.
    """
    path = locate(config.path, converted)
    if not Path(path).is_dir():
        from huggingface_hub import snapshot_download

        path = snapshot_download(path, revision=config.revision, local_files_only=True)
    files = [file for file in sorted(Path(path).glob("[!.]*")) if file.suffix in _COPIED and file.name != MANIFEST]
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"llm.path: {path} has no weights in safetensors", "export without export.with_llm")
    to.mkdir()
    for file in files:
        shutil.copyfile(file, to / file.name)


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
        raise UserError(f"llm.path: cannot load {name!r}: {_reason(error)}", _HOW_TO_NAME) from None
    finally:
        log.setLevel(level)


def read_model(loader: Any, name: str, path: str, **keywords: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model for evaluation, and what transformers says about its loading; see `read_with`, `check_loaded`."""
    keywords |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # looked at below, with their names
    model, info = read_with(loader, name, path, **keywords)
    check_loaded(model.eval(), info, name)
    return model, info


def _reason(error: Exception) -> str:
    """Return the first line of a library's message, without advice to switch a protection off."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    if re.search("weights_only|trust_remote_code|pickle", first_line):
        return "its weights are a pickle that holds more than plain tensors, or code; neither is loaded"
    return f"{type(error).__name__}: {first_line}"[:200]


def check_folder(directory: Path, allow_pickle: bool) -> None:
    """Check the files of a model's folder: one configuration with possible sizes, and whole weights in safetensors.

    Args:
        directory: a local model.
        allow_pickle: `llm.allow_pickle_weights`.

    Raises:
        UserError: a file is missing, damaged, or of a kind that is not loaded; the message names it.
    """
    if (directory / ADAPTER).exists():
        problem = f"llm.path: {directory} is an adapter of another model ({ADAPTER}), which would be fetched"
        raise UserError(problem, "merge it into its model and save that (PEFT: merge_and_unload), or remove that file")
    check_settings(directory / "config.json")
    for path in sorted(directory.glob("*.json")):
        _read(path, read_json)
    weights = _weight_files(directory)
    for path in weights:
        _read(path, lambda file: safe_open(file, "pt"))  # it compares the header with the file's size
    pickles = sorted(path for pattern in PICKLES for path in directory.glob(pattern))
    if not weights and not pickles:
        raise UserError(f"llm.path: {directory} holds no weights: neither {WEIGHTS} nor {INDEX}", _REMEDY)
    if not weights and not allow_pickle:
        remedy = "get the model in safetensors, or set llm.allow_pickle_weights: true if you trust where it comes from"
        raise UserError(f"llm.path: {pickles[0]} is a pickle, which can be made to run code", remedy)


def check_settings(path: Path) -> None:
    """Check that the sizes in a model's config.json are possible, and that it names no code of a hub.

    A library would build a model of these sizes before it looked at the weights, and fetch and run that code.

    Raises:
        UserError: it is missing, not a JSON object, has a size that no model has, or an attention kernel of a hub.
    """
    settings = _read(path, read_json)
    if not isinstance(settings, dict):
        raise UserError(f"llm.path: {path} is not a JSON object", _REMEDY)
    _check_values(settings, path)


def _check_values(settings: dict[str, Any], path: Path) -> None:
    for key, value in settings.items():
        most = MAX_LAYERS if re.search("layers?$", key) else MAX_SIZE
        if key.endswith("attn_implementation") and "/" in str(value):
            problem = f"llm.path: {path}: {key} is {value!s:.60}, code that would be fetched from a hub"
            raise UserError(problem, "remove that line; name an attention in llm.attention")
        if isinstance(value, dict):
            _check_values(value, path)
        elif isinstance(value, int | float) and _SIZE.search(key) and not -1 <= value <= most:
            raise UserError(f"llm.path: {path}: {key} is {value!s:.40}, which no model has", _REMEDY)


def _weight_files(directory: Path) -> list[Path]:
    """Return the files of weights in safetensors: one, or those that the index names."""
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (directory / INDEX).exists():
        return []
    index = _read(directory / INDEX, read_json)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise UserError(f"llm.path: {directory / INDEX} does not map each weight to a file beside it", _REMEDY)
    return [directory / name for name in sorted(set(names))]


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """Return what a function reads from a file.

    Raises:
        UserError: it is missing or damaged, or may not be read by this user.
    """
    try:
        open_file(path).close()  # safetensors does not say why it cannot open a file
        return read(path)
    except PermissionError:
        raise UserError(f"llm.path: {path} may not be read by this user", "change its permissions: chmod a+r") from None
    except UserError as error:
        raise UserError(f"llm.path: {error.problem}", _REMEDY) from None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"llm.path: {path} is missing or damaged: {reason[:200]}", _REMEDY) from None


def check_loaded(model: Any, info: dict[str, Any], name: str) -> None:
    """Check that a model has all of its weights, in the shapes of its configuration, and that all are finite.

    Heads and poolers are not used here, so they may be missing.

    Args:
        model: as transformers loaded it, with its head.
        info: what transformers says about the loading.
        name: `llm.path`, for messages.

    Raises:
        UserError: a weight is missing, surplus, of another shape, NaN or infinite.
    """
    trunk = getattr(model, model.base_model_prefix, model)
    prefix = f"{model.base_model_prefix}." if trunk is not model else ""
    missing = sorted(key for key in info["missing_keys"] if key.startswith(prefix) and "pooler." not in key)
    blocks = {_in_any_block(key, model) for key, _ in model.named_parameters()}
    surplus = sorted(key for key in info["unexpected_keys"] if _in_any_block(key, model) in blocks)
    mismatched = sorted(info["mismatched_keys"], key=str)
    weights = [(key, parameter) for key, parameter in trunk.named_parameters() if not key.startswith("pooler.")]
    problems = [f"{len(missing)} weights are missing, {missing[0]} first"] if missing else []
    problems += [] if getattr(model.config, "num_hidden_layers", 1) else ["config.json says that it has no layers"]
    problems += [f"{key} is {tuple(shape)}, by config.json {tuple(by)}" for key, shape, by in mismatched]
    problems += [f"the weights have {surplus[0]}, a layer more than config.json says"] if surplus else []
    problems += [f"the weight {key} holds NaN or infinity" for key, parameter in weights if not _is_finite(parameter)]
    if problems:
        remedy = "get the whole model again, with the config.json that belongs to its weights"
        raise UserError(f"llm.path: {name!r}: {problems[0]}", remedy)


def _in_any_block(key: str, model: Any) -> str:
    """Return the name of a weight without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", key.removeprefix(f"{model.base_model_prefix}."))


def _is_finite(parameter: torch.Tensor) -> bool:
    """Return False if a weight holds NaN or infinity; of weights in four bits, if one of their scales does."""
    values = getattr(getattr(parameter, "quant_state", None), "absmax", parameter.detach())
    if not values.is_floating_point() or not values.numel():
        return True
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def check_tokenizer(tokenizer: Any, around: Collection[int], rows: int, name: str) -> None:
    """Check that a tokenizer has words, and that the model has a vector for each token that a prompt can hold.

    Special tokens beyond are left alone: transformers adds some that the model never had, and no title holds one.

    Args:
        tokenizer: of transformers.
        around: the special tokens around a prompt.
        rows: number of the model's word vectors.
        name: `llm.path`, for messages.

    Raises:
        UserError: it has special tokens only, as where its files are missing; or more tokens than the model.
    """
    vocabulary = tokenizer.get_vocab()
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    words = {word: token for word, token in vocabulary.items() if token not in special or token in around}
    if not vocabulary.keys() - {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
        problem = f"llm.path: {name!r} has no tokenizer: its files (tokenizer.json or the like) are missing or empty"
        raise UserError(problem, "copy the tokenizer's files of the model into the folder")
    word, last = max(words.items(), key=lambda each: int(each[1]))
    if last >= rows:
        problem = f"llm.path: {name!r}: the tokenizer's token {last} ({word[:40]!r}) has no vector: it has {rows}"
        raise UserError(problem, "use the tokenizer that belongs to this model")
