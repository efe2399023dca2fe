"""Checkpoints: what trains, its optimizer moments and the loop's state, whole or not there; newest and best are kept.

A checkpoint is a directory `step-00000040` with `alignment.safetensors`, `lora/` if any, `optimizer.safetensors`,
`state.json` and a manifest of hashes. It holds no frozen weight and no pickle.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rarec.artefacts import check_files, new_directory, read_json, read_manifest, write_json, write_manifest
from rarec.models.towers import RaRec
from rarec.models.weights import load_weights, save_weights

_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


@dataclass
class TrainingState:
    """Where a run stands. With the seed it determines everything that follows.

    Attributes:
        step: optimizer steps done.
        best_step: step of the best validation; None before the first.
        best_value: its NDCG@10.
        worse: validations since the best.
        seconds: spent training so far, over all sittings.
    """

    step: int = 0
    best_step: int | None = None
    best_value: float = -1.0
    worse: int = 0
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints of one arm.

    Args:
        directory: where they stand.
        keep: how many of the newest are kept, beside the best.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def path(self, step: int) -> Path:
        """Of the checkpoint after `step` steps."""
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints there are, oldest first."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.directory.glob("step-*"))

    def save(
        self,
        model: RaRec,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
    ) -> None:
        """Write one aside, fsync, rename; then drop what need not be kept."""
        with new_directory(self.path(state.step)) as aside:
            save_weights(model, aside)
            save_file(_moments(parameters, optimizer), aside / _OPTIMIZER)
            write_json(aside / _STATE, asdict(state))
            write_manifest(aside, "checkpoint", settings={}, made_from={})
        kept = {*self.steps()[-self.keep :], state.best_step}
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.path(step))

    def resume(
        self, model: RaRec, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> TrainingState:
        """Load the newest checkpoint into model and optimizer; a fresh state where there is none."""
        if not self.steps():
            return TrainingState()
        directory = self.path(self.steps()[-1])
        verify(directory)
        load_weights(model, directory)
        _set_moments(parameters, optimizer, load_file(directory / _OPTIMIZER))
        state = TrainingState(**read_json(directory / _STATE))
        if state.best_step not in self.steps():  # it went when a better one came, which is lost
            state.best_step, state.best_value = None, -1.0
        return state

    def digests(self, step: int) -> dict[str, str]:
        """The sha256 of each file of a checkpoint but its state, which tells how long the training took."""
        files: dict[str, str] = read_manifest(self.path(step), "checkpoint")["files"]
        return {name: digest for name, digest in files.items() if name != _STATE}

    def load(self, model: RaRec, step: int) -> None:
        """Load the weights of one checkpoint."""
        verify(self.path(step))
        load_weights(model, self.path(step))


def verify(directory: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        UserError: one is missing or altered.
    """
    check_files(directory, read_manifest(directory, "checkpoint"), f"delete {directory}; the one before is used")


def _moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments by parameter name, independent of groups and their order."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _set_moments(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    for key, value in moments.items():
        name, kind = key.rsplit("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)
