"""The interface between the training loop and the engines; the launcher's file chooses the engine."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from rarec.config.method import Llm
from rarec.config.schema import Train
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.models.build import trained_parameters
from rarec.models.towers import Encoding, RaRec, SideBatch


class Optimisation(Protocol):
    """A model under training, with an optimizer step in its parts. All ranks call the same method at the same time."""

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Return the context of one part of a step, forward and backward.

        After the `last` part, gradients are those of all ranks.
        """

    def __call__(self, sides: Mapping[str, SideBatch]) -> dict[str, Encoding]:
        """Encode both sides, as the model does."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; every rank passes its part of the loss, and the parts add up."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole gradients of the step with the names of their parameters, before clipping and update."""

    def update(self, rate: float) -> None:
        """Clip the gradients, take a step with every group's learning rate times `rate`, and clear the gradients."""

    def weights(self) -> dict[str, Tensor]:
        """Return the whole trainable parameters by name."""

    def moments(self) -> dict[str, Tensor]:
        """Return Adam's whole moments, as `NAME/exp_avg` and `NAME/exp_avg_sq`."""

    def resume(self, moments: Mapping[str, Tensor], step: int) -> None:
        """Load the moments that were saved after `step` steps."""

    def end(self) -> None:
        """Release the model, which keeps its last weights."""


class Engine(Protocol):
    """Runs models on the ranks.

    Attributes:
        name: name for messages.
        world: all ranks.
    """

    name: str
    world: World

    def advice(self, llm: Llm) -> str:
        """Return a hint for users of this engine with this language model; empty if there is none."""

    def loading(self, llm: Llm) -> AbstractContextManager[None]:
        """Return the context in which language models are loaded, in shards if the engine shards them."""

    def serving(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context that places a model on its device, in which it can be called without being trained."""

    def train(self, model: RaRec, config: Train) -> Optimisation:
        """Prepare a model for training.

        Raises:
            UserError: the library built something else than the configured engine.
        """


def refuse_quantised(llm: Llm, engine: str) -> None:
    """Refuse a quantised language model, for engines that shard frozen weights: they cannot shard 4-bit weights.

    Raises:
        UserError: `llm.quantize` is set.
    """
    if llm.quantize != "none":
        remedy = "launch with configs/accelerate/zero2.yaml or ddp.yaml, or set llm.quantize: none"
        raise UserError(f"llm.quantize: {llm.quantize} (QLoRA) cannot be sharded by {engine}", remedy, shared=True)


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


MOMENTS = ("exp_avg", "exp_avg_sq")
"""PyTorch's names of Adam's moments."""
GROUPS = ("alignment", "lora_A", "lora_B", "heads")
"""Groups of parameters whose gradient norms are logged."""


def group_of(name: str) -> str:
    """Return the group of a trainable parameter."""
    lora = next((group for group in GROUPS if group.startswith("lora") and group in name), None)
    return lora or ("alignment" if ".alignment." in name else "heads")


def norms(gradients: Iterator[tuple[str, Tensor]]) -> dict[str, float]:
    """Return the gradient norm of each group that has gradients, and of all together as `all`."""
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients:
        square = torch.linalg.vector_norm(gradient.detach()) ** 2
        for group in (group_of(name), "all"):
            squares[group] = squares[group] + square if group in squares else square
    return {group: float(square.sqrt()) for group, square in squares.items()}
