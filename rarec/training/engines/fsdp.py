"""FSDP2: frozen weights are sharded over the ranks, block by block; trainable parameters are whole on each."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from rarec.config.method import Llm
from rarec.config.schema import Train
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone
from rarec.models.towers import RaRec
from rarec.training.engines.interface import refuse_quantised
from rarec.training.engines.plain import PlainOptimisation


class Fsdp2Engine:
    """PyTorch's `fully_shard`, over the frozen weights alone: the trainable ones are megabytes.

    Args:
        world: all ranks.
    """

    name = "FSDP2"

    def __init__(self, world: World) -> None:
        self.world = world
        self._mesh: DeviceMesh = init_device_mesh(world.device.type, (world.size,))

    def advice(self, llm: Llm) -> str:
        """See `Engine`."""
        return ""

    def loading(self, llm: Llm) -> AbstractContextManager[None]:
        """See `Engine`. Every rank memory-maps the whole file, and keeps its shard."""
        refuse_quantised(llm, self.name)
        return nullcontext()

    @contextmanager
    def serving(self, model: nn.Module) -> Iterator[None]:
        """See `Engine`."""
        self._shard(model)
        yield

    def train(self, model: RaRec, config: Train) -> PlainOptimisation:
        """See `Engine`."""
        self._shard(model)
        return _Averaging(model, model, config, self.world)

    def _shard(self, model: nn.Module) -> None:
        """Shard each block and the rest of the trunk; once, because variants share the backbone."""
        backbone = next(module for module in model.modules() if isinstance(module, FrozenBackbone))
        trained = {p for p in model.parameters() if p.requires_grad}
        for module in (*backbone.blocks, backbone.trunk):
            if not isinstance(module, FSDPModule):
                fully_shard(module, mesh=self._mesh, ignored_params=trained)
        model.to(self.world.device)
        whole = [n for n, p in backbone.trunk.named_parameters() if p not in trained and not isinstance(p, DTensor)]
        if whole:
            raise UserError(f"FSDP2 did not shard {len(whole)} frozen tensors, {whole[0]} first", "use another engine")


class _Averaging(PlainOptimisation):
    """Averages gradients over the ranks once in each step, in one collective operation."""

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        yield
        gradients = [gradient for _, gradient in self.gradients()]
        if last and gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self.world.size
            means = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))
