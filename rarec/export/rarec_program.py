"""From ID vectors to the keys and values of a user's prefix, by the program that `rarec export --to vllm` wrote.

Copied beside the connector, into whose process it is imported; needs torch and safetensors, not rarec.

Shape letters: L blocks, P positions of the prefix, K slots of a source, E source dimension, D hidden size, H heads of
keys, C size of a head, O = H * C.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor


class Program:
    """What `rarec.export.prefix` wrote: from ID vectors to the keys and values of the prefix.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.tensors: dict[str, Tensor] = load_file(path)
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        self.sources, self.eps = facts["sources"], facts["eps"]
        self.length = self.tensors["keys_LPHC"].shape[1]
        self.size = sum(source["count"] * source["dim"] for source in self.sources)

    def to(self, device: torch.device) -> "Program":
        """Move its tensors."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self

    def prefix(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (L, P, H, C) after the vectors of all sources, one behind the other."""
        keys, values = self.tensors["keys_LPHC"].clone(), self.tensors["values_LPHC"].clone()
        start = 0
        for source in self.sources:
            end = start + source["count"] * source["dim"]
            vectors_KE = vectors[start:end].view(source["count"], source["dim"])
            start = end
            given = (vectors_KE != 0).any(-1).nonzero().flatten().tolist()
            places = [source["places"][slot] for slot in given]  # the others keep those of a missing vector
            if places:
                keys[:, places], values[:, places] = self._of_slots(source["name"], vectors_KE[given], places)
        return keys, values

    def _of_slots(self, source: str, vectors_KE: Tensor, places: list[int]) -> tuple[Tensor, Tensor]:
        t, heads = self.tensors, self.tensors["keys_LPHC"].shape[-2:]
        slots_LKD = torch.einsum("lde,ke->lkd", t[f"map_LDE.{source}"], vectors_KE) + t[f"bias_LD.{source}"][:, None]
        x_LKD = (self._norm(slots_LKD) * t["norm_LD"][:, None]).to(t["wk_LOD"].dtype)
        keys, values = (
            (x_LKD @ t[f"w{name}_LOD"].transpose(1, 2)).float().add(t[f"b{name}_LO"][:, None]).unflatten(-1, heads)
            for name in ("k", "v")
        )
        if "key_norm_LC" in t:
            keys = self._norm(keys) * t["key_norm_LC"][:, None, None]
        half = keys.shape[-1] // 2
        turned = torch.cat([-keys[..., half:], keys[..., :half]], -1)
        return keys * t["cos_PC"][places, None] + turned * t["sin_PC"][places, None], values

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
