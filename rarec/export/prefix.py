"""The keys and values of a user's prefix: what the connector computes from ID vectors, in every block.

A slot is overwritten at the input of every block, so its keys and values are K = rotate(W_k norm(d)) and
V = W_v norm(d), whatever precedes it. The tokens before the first slot are the same for all users, and so are their
keys and values. Text behind attends to a prefix of these keys and values exactly as it attends to the slots.

Shape letters: L blocks, B users, P positions of the prefix, K slots of a source, E source dimension, D hidden size,
H heads of keys, C size of a head, O = H * C.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rarec.errors import UserError
from rarec.models.alignment import SourceAlignment
from rarec.models.backbone import FrozenBackbone
from rarec.models.slots import Slots
from rarec.models.towers import RaRec

USE_ONNX = "serve it by --to onnx, or by rarec serve"


@dataclass(frozen=True)
class Prefix:
    """What precedes the text in every user's prompt.

    Attributes:
        tokens: token ids, with fillers at slots.
        slots: places of all slots, in the order of the alignment; behind one another, and the last of the prefix.
    """

    tokens: list[int]
    slots: range

    @classmethod
    def of(cls, facts: Mapping[str, Any], pool: str) -> "Prefix":
        """Return the prefix of a prompt.

        Args:
            facts: of the prompt; see `onnx.write_prompts`.
            pool: `mean`, or `last`.

        Raises:
            UserError: a slot is behind or within the history; text is between slots; or text that is read is before
                them.
        """
        places = [index for _, index in sorted(facts["before_slots"])]
        first = min(places, default=1)
        slots = range(first, first + len(places))
        same = sorted(facts["before_slots"]) == sorted(facts["empty_slots"])
        if facts["titles_first"]:
            problem = "vLLM takes slots of every block before the text alone, not between titles"
            raise UserError(f"prompt.title: {problem}", f"leave slots out of prompt.title, and train; or {USE_ONNX}")
        if facts["after_slots"] or places != list(slots) or not same or first < 1:
            problem = "vLLM takes slots of every block before the text alone, and behind its first token"
            raise UserError(f"prompt.user: {problem}", f"put them first, as in {{soft:id}} {{history}}; or {USE_ONNX}")
        if (pool == "mean" and first > 1) or len(facts["empty"]) <= slots.stop:
            problem = "the text before the slots is read, and vLLM gives the states behind them alone"
            raise UserError(f"prompt.user: {problem}", f"put {{soft:NAME}} first; or {USE_ONNX}")
        return cls(facts["before"][: slots.stop], slots)


def write_program(model: RaRec, prefix: Prefix, path: Path, dtype: torch.dtype) -> None:
    """Write the program of a model whose slots are in every block, or that has none.

    Args:
        model: in float32, on the CPU.
        prefix: of its users' prompts.
        path: to write, safetensors.
        dtype: of the weights of keys and values; that of the served model.

    Raises:
        UserError: the model's blocks have no keys and values of a kind that is known here, or a map is the user's own.
    """
    tensors, sources = _maps(model, prefix)
    blank = {source["name"]: torch.zeros(1, source["count"], source["dim"]) for source in sources}
    keys, values = cached(model, prefix, blank)
    tensors |= {"keys_LPHC": keys[:, 0], "values_LPHC": values[:, 0]}
    if sources:
        tensors |= _projections(model.backbone, keys.shape[-2:], dtype) | _rotation(model.backbone, len(prefix.tokens))
    norm: Any = getattr(model.backbone.blocks[0], "input_layernorm", None)
    eps = getattr(norm, "variance_epsilon", 0.0) if sources else 0.0
    contiguous = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, path, {"facts": json.dumps({"sources": sources, "eps": eps})})


@torch.no_grad()
def cached(model: RaRec, prefix: Prefix, vectors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return keys and values of the prefix as the model itself computes them, (L, B, P, H, C) each.

    Args:
        model: the two towers.
        prefix: of its users' prompts.
        vectors: of each source, (B, K, E).
    """
    alignment, backbone = model.user.alignment, model.backbone
    slots, count = None, 1
    if alignment is not None and prefix.slots:
        slots_LBKD, _ = alignment(vectors)
        blocks = model.user.alignment_blocks
        count = slots_LBKD.shape[1]
        positions_BK = torch.tensor(prefix.slots).expand(count, -1)
        slots = Slots(slots_LBKD[: len(blocks)], positions_BK, blocks)
    ids_BP = torch.tensor(prefix.tokens).expand(count, -1)
    with backbone.injector.inject(slots):
        output = backbone.trunk(input_ids=ids_BP, use_cache=True)
    cache = getattr(output, "cache", None) or output.past_key_values
    if len(getattr(cache, "layers", ())) != len(backbone.blocks):
        raise _unknown(backbone)
    keys, values = (torch.stack([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values"))
    return keys.transpose(2, 3), values.transpose(2, 3)


def _maps(model: RaRec, prefix: Prefix) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return each source's map from an ID vector to a slot in every block, and where its slots are."""
    alignment = model.user.alignment
    blocks = len(model.backbone.blocks)
    tensors = dict[str, Tensor]()
    sources = list[dict[str, Any]]()
    if alignment is None or not prefix.slots:
        return tensors, sources
    if model.user.alignment_blocks != tuple(range(blocks)):
        given = f"this variant has slots in {len(model.user.alignment_blocks)} of {blocks} blocks"
        raise UserError(f"{given}; vLLM keeps slots of every block, or of the input alone", USE_ONNX)
    end = prefix.slots.start
    for name, source in alignment.named_sources():
        if type(source).project is not SourceAlignment.project:
            raise UserError("alignment.map is your own, which vLLM's connector does not know", USE_ONNX)
        end += source.count
        if source.projections:
            map_LDE, bias_LD = _affine(source)
            tensors |= {f"map_LDE.{name}": map_LDE[:blocks], f"bias_LD.{name}": bias_LD[:blocks]}
            count, dim = source.shape.vectors, source.shape.dim
            sources.append({"name": name, "count": count, "dim": dim, "places": list(range(end - count, end))})
    return tensors, sources


def _affine(source: SourceAlignment) -> tuple[Tensor, Tensor]:
    """Return p = A e + a of all blocks, with standardisation and units inside: (L, D, E) and (L, D)."""
    parameters = (source.weight_LDE, source.bias_LD, source.center_E, source.scale_E, source.unit_L)
    weight, bias, center, scale, unit = (tensor.detach().double() for tensor in parameters)
    map_LDE = weight / scale * unit[:, None, None]
    bias_LD = (bias - weight @ (center / scale)) * unit[:, None]
    return map_LDE.float(), bias_LD.float()


def _projections(backbone: FrozenBackbone, heads: torch.Size, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights by which every block makes keys and values of a hidden state, LoRA merged."""
    tensors: dict[str, list[Tensor]] = {}
    if not hasattr(backbone.trunk, "rotary_emb"):
        raise _unknown(backbone)
    block: Any
    for block in backbone.blocks:
        attention: Any = getattr(block, "self_attn", None)
        if not hasattr(attention, "k_proj") or not hasattr(attention, "v_proj"):
            raise _unknown(backbone)
        own: dict[str, Tensor] = {"norm_LD": block.input_layernorm.weight}
        for name in ("k", "v"):
            weight, bias = _linear(getattr(attention, f"{name}_proj"), backbone.hidden_size)
            own |= {f"w{name}_LOD": weight.to(dtype), f"b{name}_LO": bias}
        if hasattr(attention, "k_norm"):
            own["key_norm_LC"] = attention.k_norm.weight
        for name, tensor in own.items():
            tensors.setdefault(name, []).append(tensor)
    stacked = {name: torch.stack(blocks) for name, blocks in tensors.items()}
    if stacked["wk_LOD"].shape[1] != heads.numel():
        raise _unknown(backbone)
    return stacked


@torch.no_grad()
def _linear(module: nn.Module, size: int) -> tuple[Tensor, Tensor]:
    """Return weight (O, D) and bias (O,) of a linear map, whatever it is made of, such as LoRA."""
    bias: Tensor = module(torch.zeros(1, size))[0]
    weight: Tensor = module(torch.eye(size)) - bias
    return weight.T, bias


def _rotation(backbone: FrozenBackbone, count: int) -> dict[str, Tensor]:
    """Return cosines and sines by which keys at the positions of the prefix are rotated."""
    rotate: Any = backbone.trunk.rotary_emb
    cos, sin = rotate(torch.zeros(1, count, backbone.hidden_size), position_ids=torch.arange(count)[None])
    return {"cos_PC": cos[0], "sin_PC": sin[0]}


def _unknown(backbone: FrozenBackbone) -> UserError:
    name = type(backbone.trunk).__name__
    return UserError(f"{name} makes keys and values in a way that vLLM's connector does not know", USE_ONNX)
