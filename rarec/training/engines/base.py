"""What the loop asks of an engine. Which one runs is a choice of the launcher's file, and the loop knows no more."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from rarec.config.method import Llm
from rarec.config.schema import Train
from rarec.errors import UserError
from rarec.models.build import trained_parameters
from rarec.models.towers import Encoding, RaRec, SideBatch
from rarec.world import World


class Optimisation(Protocol):
    """A model under training: an optimizer step in its parts. All ranks must ask for the same at the same time."""

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Around one part of a step, forward and backward; after the `last`, gradients are those of all ranks."""

    def __call__(self, sides: Mapping[str, SideBatch]) -> dict[str, Encoding]:
        """The model."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss of which every rank has its part; the parts add up."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The step's gradients by the parameter's name, whole and unclipped, before the update."""

    def update(self, rate: float) -> None:
        """Clip, step with every group's learning rate times this, and forget the gradients."""

    def weights(self) -> dict[str, Tensor]:
        """What trains, by name, whole."""

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments, `NAME/exp_avg` and `NAME/exp_avg_sq`, whole."""

    def resume(self, moments: Mapping[str, Tensor], step: int) -> None:
        """Take up the moments that were saved after so many steps."""

    def end(self) -> None:
        """Leave the model, with its last weights, to others."""


class Engine(Protocol):
    """Runs models on the ranks.

    Attributes:
        name: for people.
        world: all of them.
    """

    name: str
    world: World

    def advice(self, llm: Llm) -> str:
        """What a user should know of this engine with this language model; empty if nothing."""

    def loading(self, llm: Llm) -> AbstractContextManager[None]:
        """Language models are loaded in it, shard by shard where the engine shards them."""

    def serving(self, model: nn.Module) -> AbstractContextManager[None]:
        """In it a model, placed where it belongs, can be called, without being trained."""

    def train(self, model: RaRec, config: Train) -> Optimisation:
        """Put a model under training.

        Raises:
            UserError: what was built is not what was asked for.
        """


def refuse_quantised(llm: Llm, engine: str) -> None:
    """For engines that shard frozen weights: they cannot cut those of 4 bits.

    Raises:
        UserError: the language model is to be quantised.
    """
    if llm.quantize != "none":
        remedy = "launch with configs/accelerate/zero2.yaml or ddp.yaml, or set llm.quantize: none"
        raise UserError(f"llm.quantize: {llm.quantize} (QLoRA) cannot be sharded by {engine}", remedy, shared=True)


class Trained(nn.Module):
    """What trains, as a module of its own that computes the whole model.

    An engine that replicates, casts or averages parameters is given this one: it never sees the frozen ones.
    """

    def __init__(self, model: RaRec) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained_parameters(model).values())
        self._model = (model,)  # a tuple: not a part of this module

    def forward(self, sides: Mapping[str, SideBatch]) -> dict[str, Encoding]:
        """As the model's."""
        encodings: dict[str, Encoding] = self._model[0](sides)
        return encodings


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, as PyTorch names them."""
GROUPS = ("alignment", "lora_A", "lora_B", "heads")
"""Of parameters, as their gradients are watched."""


def group_of(name: str) -> str:
    """The group that a trained parameter belongs to."""
    lora = next((group for group in GROUPS if group.startswith("lora") and group in name), None)
    return lora or ("alignment" if ".alignment." in name else "heads")


def norms(gradients: Iterator[tuple[str, Tensor]]) -> dict[str, float]:
    """The gradient norm of each group that is there, and of all of them as `all`."""
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients:
        square = torch.linalg.vector_norm(gradient.detach()) ** 2
        for group in (group_of(name), "all"):
            squares[group] = squares[group] + square if group in squares else square
    return {group: float(square.sqrt()) for group, square in squares.items()}
