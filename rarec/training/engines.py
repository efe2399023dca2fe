"""Engines run and train models on the ranks: PyTorch in one process, DDP and FSDP2; DeepSpeed is in `zero`.

The launcher's file chooses the engine. All ranks call the same method at the same time.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rarec.config.method import Llm
from rarec.config.schema import Train
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone
from rarec.models.build import trained_parameters
from rarec.models.towers import Encoding, RaRec, SideBatch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""PyTorch's names of Adam's moments."""


class Engine:
    """PyTorch without sharding: one process, or DDP. Other engines override what they do differently.

    Args:
        world: all ranks.

    Attributes:
        name: name for messages.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.name = "DDP" if world.size > 1 else "one process"

    def loading(self, llm: Llm) -> AbstractContextManager[None]:
        """Return the context in which language models are loaded, in shards if the engine shards them."""
        return nullcontext()

    @contextmanager
    def serving(self, model: nn.Module) -> Iterator[None]:
        """Place a model on its device; within the context it can be called without being trained."""
        self.place(model)
        yield

    def train(self, model: RaRec, config: Train) -> "Optimisation":
        """Prepare a model for training.

        Raises:
            UserError: the library built something else than the configured engine.
        """
        self.place(model)
        module = TrainableModule(model)
        wrapped = DistributedDataParallel(module) if self.world.size > 1 else module
        return Optimisation(model, wrapped, config, self.world)

    def place(self, model: nn.Module) -> None:
        """Move a model to the device."""
        model.to(self.world.device)

    def refuse_quantised(self, llm: Llm) -> None:
        """Refuse a quantised language model, for engines that shard frozen weights: they cannot shard 4-bit weights.

        Raises:
            UserError: `llm.quantize` is set.
        """
        if llm.quantize != "none":
            remedy = "launch with configs/accelerate/zero2.yaml or ddp.yaml, or set llm.quantize: none"
            problem = f"llm.quantize: {llm.quantize} (QLoRA) cannot be sharded by {self.name}"
            raise UserError(problem, remedy, shared=True)


class Fsdp2Engine(Engine):
    """PyTorch's `fully_shard`, over the frozen weights alone: the trainable ones, megabytes, are replicated by DDP."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.name = "FSDP2"
        self._mesh = init_device_mesh(world.device.type, (world.size,))

    def loading(self, llm: Llm) -> AbstractContextManager[None]:
        """See `Engine`. Every rank memory-maps the whole file, and keeps its shard."""
        self.refuse_quantised(llm)
        return nullcontext()

    def place(self, model: nn.Module) -> None:
        """Shard each block and the rest of the trunk; once, because variants share the backbone."""
        backbone = next(module for module in model.modules() if isinstance(module, FrozenBackbone))
        trained = {p for p in model.parameters() if p.requires_grad}
        for module in (*backbone.blocks, backbone.trunk):
            if not isinstance(module, FSDPModule):
                fully_shard(module, mesh=self._mesh, ignored_params=trained)
        super().place(model)
        whole = [n for n, p in backbone.trunk.named_parameters() if p not in trained and not isinstance(p, DTensor)]
        if whole:
            raise UserError(f"FSDP2 did not shard {len(whole)} frozen tensors, {whole[0]} first", "use another engine")


class TrainableModule(nn.Module):
    """A module whose parameters are the trainable ones alone, and whose forward pass is that of the whole model.

    It is given to engines that replicate, cast or average parameters, so that they do not touch the frozen ones.
    """

    def __init__(self, model: RaRec) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained_parameters(model).values())
        self._model = (model,)  # in a tuple, so that it is not registered as a submodule

    def forward(self, sides: Mapping[str, SideBatch]) -> dict[str, Encoding]:
        """Encode both sides, as the model does."""
        encodings: dict[str, Encoding] = self._model[0](sides)
        return encodings


class Optimisation:
    """A model under training, with an optimizer step in its parts. Its trainable parameters are whole on every rank.

    Args:
        model: the model to train.
        wrapped: called in place of the model; averages gradients over the ranks.
        config: the section `train`.
        world: all ranks.
        optimizer: updates the parameters; a new AdamW by default.
    """

    def __init__(self, model: RaRec, wrapped: Any, config: Train, world: World, optimizer: Any = None) -> None:
        self.wrapped, self.world, self.clip = wrapped, world, config.clip
        self.parameters = trained_parameters(model)
        self.optimizer: Any = build_optimizer(self.parameters, config) if optimizer is None else optimizer

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Return the context of one part of a step, forward and backward.

        After the `last` part, gradients are those of all ranks.
        """
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        waits: AbstractContextManager[None] = self.wrapped.no_sync()
        return waits

    def __call__(self, sides: Mapping[str, SideBatch]) -> dict[str, Encoding]:
        """Encode both sides, as the model does."""
        encodings: dict[str, Encoding] = self.wrapped(sides)
        return encodings

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; every rank passes its part of the loss, and the parts add up."""
        torch.autograd.backward(loss * self.world.size)  # losses add up over the ranks, but gradients are averaged

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole gradients of the step with the names of their parameters, before clipping and update."""
        return ((name, p.grad) for name, p in self.parameters.items() if p.grad is not None)

    def update(self, rate: float) -> None:
        """Clip the gradients, take a step with every group's learning rate times `rate`, and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """Return the whole trainable parameters by name."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        """Return Adam's whole moments, as `NAME/exp_avg` and `NAME/exp_avg_sq`."""
        states = ((name, self.optimizer.state[p]) for name, p in self.parameters.items() if p in self.optimizer.state)
        return {f"{name}/{kind}": state[kind] for name, state in states for kind in MOMENTS}

    def resume(self, moments: Mapping[str, Tensor], step: int) -> None:
        """Load the moments that were saved after `step` steps."""
        begun = {key.rpartition("/")[0] for key in moments}  # no gradient has reached the others yet
        for name, parameter in self.parameters.items():
            if name not in begun:
                continue
            own = {kind: moments[f"{name}/{kind}"].to(parameter.device).clone() for kind in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **own}

    def end(self) -> None:
        """Release the model, which keeps its last weights."""


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: Train) -> torch.optim.AdamW:
    """Return AdamW with parameter groups for the readout, the alignment and LoRA; no group is empty.

    One-dimensional and scalar parameters have no weight decay.
    """
    groups: list[dict[str, Any]] = []
    for part, rate in (("", config.lr), (".alignment.", config.lr_slots), ("lora_", config.lr_lora)):
        for decays in (True, False):
            chosen = [p for n, p in parameters.items() if _part(n) == part and (p.ndim > 1) == decays]
            if chosen:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


def _part(name: str) -> str:
    return next((part for part in ("lora_", ".alignment.") if part in name), "")


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rates for one step: a linear warm-up, then a cosine.

    `transformers.get_cosine_schedule_with_warmup` differs: its first step has rate zero, and so changes nothing.

    Args:
        step: index of the step, 0 to steps - 1.
        steps: number of steps.
        warmup: share of the steps that warm up.
    """
    warm = max(1, round(steps * warmup)) if warmup else 0
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
