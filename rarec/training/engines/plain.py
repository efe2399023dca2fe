"""PyTorch alone: one process, or DDP, where every rank has the whole model."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rarec.config.method import Llm
from rarec.config.schema import Train
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.models.build import trained_parameters
from rarec.models.towers import Encoding, RaRec, SideBatch
from rarec.training.engines.interface import MOMENTS, TrainableModule
from rarec.training.optimizer import build_optimizer, set_rate


class PlainEngine:
    """PyTorch without sharding.

    Args:
        world: all ranks.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.name = "DDP" if world.size > 1 else "one process"

    def advice(self, llm: Llm) -> str:
        """See `Engine`."""
        return ""

    def loading(self, llm: Llm) -> AbstractContextManager[None]:
        """See `Engine`."""
        return nullcontext()

    @contextmanager
    def serving(self, model: nn.Module) -> Iterator[None]:
        """See `Engine`."""
        model.to(self.world.device)
        yield

    def train(self, model: RaRec, config: Train) -> "PlainOptimisation":
        """See `Engine`."""
        model.to(self.world.device)
        wrapped = Accelerator(cpu=self.world.device.type == "cpu").prepare(TrainableModule(model))
        if self.world.size > 1 and not isinstance(wrapped, DistributedDataParallel):
            raise UserError(f"Accelerate built {type(wrapped).__name__} for {self.world.size} ranks")
        return PlainOptimisation(model, wrapped, config, self.world)


class PlainOptimisation:
    """A model whose trainable parameters are whole on every rank.

    Args:
        model: the model to train.
        wrapped: called in place of the model; averages gradients over the ranks.
        config: the section `train`.
        world: all ranks.
    """

    def __init__(self, model: RaRec, wrapped: nn.Module, config: Train, world: World) -> None:
        self.wrapped, self.world, self.clip = wrapped, world, config.clip
        self.parameters = trained_parameters(model)
        self.optimizer = build_optimizer(self.parameters, config)

    def part(self, last: bool) -> AbstractContextManager[None]:
        """See `Optimisation`."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        waits: AbstractContextManager[None] = self.wrapped.no_sync()
        return waits

    def __call__(self, sides: Mapping[str, SideBatch]) -> dict[str, Encoding]:
        """See `Optimisation`."""
        encodings: dict[str, Encoding] = self.wrapped(sides)
        return encodings

    def backward(self, loss: Tensor) -> None:
        """See `Optimisation`."""
        torch.autograd.backward(loss * self.world.size)  # losses add up over the ranks, but gradients are averaged

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `Optimisation`."""
        return ((name, p.grad) for name, p in self.parameters.items() if p.grad is not None)

    def update(self, rate: float) -> None:
        """See `Optimisation`."""
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """See `Optimisation`."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        """See `Optimisation`."""
        states = ((name, self.optimizer.state[p]) for name, p in self.parameters.items() if p in self.optimizer.state)
        return {f"{name}/{kind}": state[kind] for name, state in states for kind in MOMENTS}

    def resume(self, moments: Mapping[str, Tensor], step: int) -> None:
        """See `Optimisation`."""
        begun = {key.rpartition("/")[0] for key in moments}  # no gradient has reached the others yet
        for name, parameter in self.parameters.items():
            if name not in begun:
                continue
            own = {kind: moments[f"{name}/{kind}"].to(parameter.device).clone() for kind in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **own}

    def end(self) -> None:
        """See `Optimisation`."""
