"""Checkpoints: what trains, its optimizer moments and the loop's state, whole or not there; newest and best are kept.

A checkpoint is a directory `step-00000040` with `alignment.safetensors`, `lora/` if any, `optimizer.safetensors`,
`state.json` and a manifest of hashes. It holds no frozen weight and no pickle, and knows neither how many ranks wrote
it nor by what engine: any number of them goes on from it.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from rarec.artefacts import check_files, read_manifest, write_manifest
from rarec.errors import UserError
from rarec.files import new_directory, read_json, write_json
from rarec.models.towers import RaRec
from rarec.models.weights import Weights, load_weights, save_weights

_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
Say = Callable[[str], None]


class Torn(UserError):
    """A checkpoint that is not as it was written."""


@dataclass
class TrainingState:
    """Where a run stands. With the seed it determines everything that follows.

    Attributes:
        step: optimizer steps done.
        best_step: step of the best validation; None before the first.
        best_value: its NDCG@100.
        worse: validations since the best.
        seconds: spent training so far, over all sittings.
    """

    step: int = 0
    best_step: int | None = None
    best_value: float = -1.0
    worse: int = 0
    seconds: float = 0.0

    def forget_best(self) -> None:
        """It is no longer there: the next validation is the best."""
        self.best_step, self.best_value = None, -1.0


class Checkpoints:
    """The checkpoints of one variant.

    Args:
        directory: where they stand.
        keep: how many of the newest are kept, beside the best.
        belongs_to: hash of the training.
    """

    def __init__(self, directory: Path, keep: int, belongs_to: str) -> None:
        self.directory, self.keep, self.belongs_to = directory, keep, belongs_to

    def path(self, step: int) -> Path:
        """Of the checkpoint after `step` steps."""
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, oldest first; each was whole when it was written."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.directory.glob("step-*"))

    def save(self, model: RaRec, weights: Weights, moments: Weights, state: TrainingState) -> None:
        """Write one aside, fsync, rename; then drop what need not be kept.

        Args:
            model: says what is beside the trained weights.
            weights: what trains, whole, by name.
            moments: Adam's, whole, as `Optimisation.moments` gives them.
            state: of the loop.
        """
        with new_directory(self.path(state.step)) as aside:
            save_weights(model, aside, weights)
            save_file({name: moment.cpu().contiguous() for name, moment in moments.items()}, aside / _OPTIMIZER)
            write_json(aside / _STATE, asdict(state))
            write_manifest(aside, "checkpoint", settings={}, made_from={"train": self.belongs_to})
        kept = {*self.steps()[-self.keep :], state.best_step}
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.path(step))

    def newest(self, say: Say) -> int | None:
        """The step of the newest whole checkpoint; None where there is none at all. Torn ones are told and dropped.

        One process alone asks, for all. Where none is whole, none is dropped: nothing is begun anew in silence.

        Raises:
            UserError: there are checkpoints, but none is whole; or one belongs to another training.
        """
        torn: dict[int, str] = {}
        whole: list[int] = []
        for step in self.steps():
            try:
                self.verify(step)
            except Torn as error:
                torn[step] = error.problem
            else:
                whole.append(step)
        if torn and not whole:
            remedy = "begin again: rarec train CONFIG --fresh"
            raise UserError(f"{self.directory}: none of {len(torn)} checkpoints is whole", remedy)
        for step, problem in torn.items():
            say(f"{problem}: dropped, going on from {self.path(whole[-1]).name}")
            shutil.rmtree(self.path(step))
        return max(whole, default=None)

    def verify(self, step: int) -> None:
        """Check every file of a checkpoint against its manifest, and that it belongs here.

        Raises:
            Torn: a file is missing or altered.
            UserError: it is of another training: another base model, alignment, dataset, or other settings.
        """
        directory = self.path(step)
        try:
            manifest = read_manifest(directory, "checkpoint")
            check_files(directory, manifest)
        except UserError as error:
            raise Torn(error.problem, f"delete {directory}: the one before is used") from None
        if manifest["made_from"].get("train") != self.belongs_to:
            problem = f"{directory} is a checkpoint of another training: other data, another model, or other settings"
            raise UserError(problem, f"take it away; {self.directory} holds what this training wrote")

    def state(self, step: int) -> TrainingState:
        """Of the loop, as it was saved."""
        state = TrainingState(**read_json(self.path(step) / _STATE))
        if state.best_step not in self.steps():  # it was torn, or went when a better one came, which is lost
            state.forget_best()
        return state

    def moments(self, step: int) -> dict[str, Tensor]:
        """Adam's, as they were saved."""
        return load_file(self.path(step) / _OPTIMIZER)

    def digests(self, step: int) -> dict[str, str]:
        """The sha256 of each file of a checkpoint but its state, which tells how long the training took."""
        files: dict[str, str] = read_manifest(self.path(step), "checkpoint")["files"]
        return {name: digest for name, digest in files.items() if name != _STATE}

    def load(self, model: RaRec, step: int) -> None:
        """Load the weights of one checkpoint, after checking it."""
        self.verify(step)
        load_weights(model, self.path(step))
