"""Check the folder of a language model before any of it is loaded, and what was loaded after.

A library that loads a model fills gaps with random numbers and reads pickles; what is refused here is refused before.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from rarec.errors import UserError
from rarec.storage.files import open_file, read_json

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_SIZE = 1 << 24
"""Largest size in a model's config.json: above any vocabulary, width or context length there is."""
MAX_LAYERS = 2_000
_SIZE = re.compile(r"(size|embeddings|positions|_dim|dim|layers?|heads|_embd|_ctx|n_inner)$")
_REMEDY = "get the whole model again"


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
    settings = check_settings(directory / "config.json")
    for path in sorted(directory.glob("*.json")):
        _read(path)
    shards = _shards(directory)
    if not shards:
        _check_pickles(directory, allow_pickle)
        return
    tensors = {shard: _tensors(directory / shard) for shard in dict.fromkeys(shards.values())}
    lost = next((name for name, shard in shards.items() if name and name not in tensors[shard]), None)
    if lost is not None:
        raise UserError(f"llm.path: {directory / shards[lost]} lacks {lost}, which {INDEX} says it has", _REMEDY)
    count, layers = sum(map(len, tensors.values())), settings.get("num_hidden_layers", settings.get("n_layer", 0))
    if isinstance(layers, int) and layers > count:
        problem = f"llm.path: {directory / 'config.json'} says {layers:,} layers, but the weights are {count} tensors"
        raise UserError(problem, _REMEDY)


def check_settings(path: Path) -> dict[str, Any]:
    """Return what a model's config.json says, after a check that its sizes are possible.

    A library would build a model of these sizes before it looked at the weights.

    Raises:
        UserError: it is missing, not a JSON object, or has a size that no model has.
    """
    settings = _read_object(path)
    _check_sizes(settings, path)
    return settings


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
    trunk = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    absent = sorted(key for key in info["missing_keys"] if key.startswith(trunk) and "pooler." not in key)
    if absent:
        raise UserError(f"llm.path: {name!r} lacks {len(absent)} weights, {absent[0]} first", "get the whole model")
    for key, found, wanted in sorted(info["mismatched_keys"], key=str):
        problem = f"llm.path: {name!r}: {key} is {tuple(found)} in the weights, but {tuple(wanted)} by config.json"
        raise UserError(problem, "use the config.json that belongs to these weights")
    surplus = _surplus(model, info["unexpected_keys"])
    if surplus is not None:
        problem = f"llm.path: {name!r}: the weights have {surplus}, a layer more than config.json says"
        raise UserError(problem, "use the config.json that belongs to these weights")
    for key, parameter in getattr(model, model.base_model_prefix, model).named_parameters():
        if not key.startswith("pooler.") and not _finite(parameter):
            problem = f"llm.path: {name!r}: the weight {key} holds NaN or infinity"
            raise UserError(problem, "get the model again, or another one: this one computes nothing")


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
        problem = (
            f"llm.path: {name!r}: the tokenizer's token {last} ({word[:40]!r}) has no vector: the model has {rows}"
        )
        raise UserError(problem, "use the tokenizer that belongs to this model")


def _read_object(path: Path) -> dict[str, Any]:
    found = _read(path)
    if not isinstance(found, dict):
        raise UserError(f"llm.path: {path} is not a JSON object", _REMEDY)
    return found


def _read(path: Path) -> Any:
    _check_readable(path)
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(f"llm.path: {error.problem}", _REMEDY) from None


def _check_readable(path: Path) -> None:
    """Open a file for a moment: safetensors does not say why it cannot."""
    try:
        open_file(path).close()
    except FileNotFoundError:
        raise UserError(f"llm.path: {path} does not exist", _REMEDY) from None
    except PermissionError:
        raise UserError(f"llm.path: {path} may not be read by this user", "change its permissions: chmod a+r") from None
    except FileExistsError as error:
        raise UserError(f"llm.path: {path}: {error.strerror}", _REMEDY) from None


def _check_sizes(settings: dict[str, Any], path: Path) -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            _check_sizes(value, path)
        elif isinstance(value, int | float) and _SIZE.search(key) and not -1 <= value <= _largest(key):
            raise UserError(f"llm.path: {path}: {key} is {value!s:.40}, which no model has", _REMEDY)


def _largest(key: str) -> int:
    return MAX_LAYERS if re.search("layers?$", key) else MAX_SIZE


def _shards(directory: Path) -> dict[str, str]:
    """Return the safetensors file of each tensor; of an empty name, if there is one file; none without safetensors."""
    if (directory / WEIGHTS).exists():
        return {"": WEIGHTS}
    if not (directory / INDEX).exists():
        return {}
    shards = _read_object(directory / INDEX).get("weight_map")
    names = shards.values() if isinstance(shards, dict) else []
    if not shards or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        problem = f"llm.path: {directory / INDEX} does not map each weight to a file beside it"
        raise UserError(problem, _REMEDY)
    return dict(shards)


def _tensors(path: Path) -> set[str]:
    """Return the names in a safetensors file. Its header is compared with its size, so a torn one is noticed."""
    _check_readable(path)
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"llm.path: {path} is no whole safetensors file: {str(error)[:200]}", _REMEDY) from None


def _check_pickles(directory: Path, allow_pickle: bool) -> None:
    pickles = sorted(path for pattern in PICKLES for path in directory.glob(pattern))
    if pickles and not allow_pickle:
        remedy = "get the model in safetensors, or set llm.allow_pickle_weights: true if you trust where it comes from"
        raise UserError(f"llm.path: {pickles[0]} is a pickle, which can be made to run code", remedy)
    if not pickles:
        raise UserError(f"llm.path: {directory} holds no weights: neither {WEIGHTS} nor {INDEX}", _REMEDY)


def _surplus(model: Any, unexpected: Any) -> str | None:
    """Return a weight of a block that the model does not have."""
    count = getattr(model.config, "num_hidden_layers", 0)
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    for name in lists:
        place = re.compile(rf"(?:^|\.){re.escape(name.removeprefix(f'{model.base_model_prefix}.'))}\.(\d+)\.")
        for key in sorted(unexpected):
            found = place.search(key)
            if found and int(found[1]) >= count:
                return str(key)
    return None


def _finite(parameter: torch.Tensor) -> bool:
    """Return False if a weight holds NaN or infinity; of weights in four bits, if one of their scales does."""
    return all(bool(torch.stack(torch.aminmax(part)).isfinite().all()) for part in _floats(parameter) if part.numel())


def _floats(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    values = getattr(getattr(parameter, "quant_state", None), "absmax", parameter.detach())
    if values.is_floating_point():
        yield values
