"""Every weight of a variant's model, by what engines do with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from rarec.models.towers import RaRec

META = torch.device("meta")
NF4_BYTES = 0.5 + 4 / 64
"""Of a weight in 4 bits: with one float32 for every 64 of them, bitsandbytes' default block."""


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        name: in the model.
        shape: whole.
        width: bytes of an element.
        trains: whether it does.
        linear: whether it is the matrix of a frozen linear layer.
        block: of the language model; None outside the blocks.
        in_trunk: whether it belongs to the language model.
    """

    name: str
    shape: tuple[int, ...]
    width: float
    trains: bool
    linear: bool
    block: int | None
    in_trunk: bool

    @property
    def count(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Whole."""
        return round(self.count * self.width)


class VariantShapes:
    """A variant's model, and every weight of it.

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
        """Alignment, heads, scale, LoRA."""
        return [weight for weight in self.weights if weight.trains]

    @property
    def fixed(self) -> int:
        """Bytes of what is computed before the first step and then stays, on every rank: whitening, units of blocks."""
        towers = (self.model.user, self.model.item)
        return sum(number.numel() * number.element_size() for tower in towers for number in tower.buffers())

    @property
    def in_blocks(self) -> int:
        """Weights in the language model's blocks, LoRA among them: the N of 4N."""
        return sum(weight.count for weight in self.weights if weight.block is not None)

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

    def bundled(self, dtype: str) -> int:
        """Bytes of a bundle's tensors, if what trains is written in this type."""
        halved = sum(weight.bytes // 2 for weight in self.trained if "lora_" not in weight.name)
        return sum(self.saved.values()) - (halved if dtype == "float16" else 0)

    def _weights(self) -> Iterator[Weight]:
        backbone = self.model.backbone
        blocks = {id(p): at for at, block in enumerate(backbone.blocks) for p in block.parameters()}
        trunk = {id(p) for p in backbone.trunk.parameters()}
        linear = {
            id(module.weight): name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)
        }
        for name, p in self.model.named_parameters():
            matrix = id(p) in linear and not p.requires_grad
            packed = self.nf4 and matrix and id(p) in trunk
            width = NF4_BYTES if packed else p.element_size()
            yield Weight(name, tuple(p.shape), width, p.requires_grad, matrix, blocks.get(id(p)), id(p) in trunk)
