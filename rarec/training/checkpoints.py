"""Checkpoints of a variant: trainable parameters, optimizer moments and the loop's state; newest and best are kept.

A checkpoint holds `alignment.safetensors`, `lora/` if the variant has LoRA, `optimizer.safetensors`, and what every
`CheckpointStore` writes. It has no frozen weight, and does not depend on the number of ranks or the engine that wrote
it: any of them can resume from it.
"""

from dataclasses import asdict, dataclass

from safetensors.torch import load_file, save_file
from torch import Tensor

from rarec.models.build import Weights, load_weights, save_weights
from rarec.models.towers import RaRec
from rarec.storage.checkpoint_store import CheckpointStore

_OPTIMIZER = "optimizer.safetensors"


@dataclass
class TrainingState:
    """The state of the training loop. With the seed it determines every later step.

    Attributes:
        step: optimizer steps done.
        best_step: step of the best validation; None before the first.
        best_value: NDCG@100 of the best validation.
        worse: number of validations since the best.
        seconds: time spent training so far, over all restarts.
    """

    step: int = 0
    best_step: int | None = None
    best_value: float = -1.0
    worse: int = 0
    seconds: float = 0.0

    def forget_best(self) -> None:
        """Reset the best, whose checkpoint is lost: the next validation becomes the best."""
        self.best_step, self.best_value = None, -1.0


class Checkpoints(CheckpointStore):
    """The checkpoints of one variant."""

    def save(self, model: RaRec, weights: Weights, moments: Weights, state: TrainingState) -> None:
        """Write a checkpoint, then delete those that need not be kept.

        Args:
            model: gives what is saved beside the trained weights.
            weights: all trainable parameters, unsharded, by name.
            moments: Adam's moments, unsharded, from `Optimisation.moments`.
            state: of the loop.
        """
        with self.writing(state.step, asdict(state), state.best_step) as temporary:
            save_weights(model, temporary, weights)
            save_file({name: moment.cpu().contiguous() for name, moment in moments.items()}, temporary / _OPTIMIZER)

    def state(self, step: int) -> TrainingState:
        """Read the state of the loop."""
        state = TrainingState(**self.read_state(step))
        if state.best_step not in self.steps():  # corrupt, or replaced by a better one that is lost
            state.forget_best()
        return state

    def moments(self, step: int) -> dict[str, Tensor]:
        """Read Adam's moments."""
        return load_file(self.path(step) / _OPTIMIZER)

    def load(self, model: RaRec, step: int) -> None:
        """Check a checkpoint, then load its weights into the model.

        Raises:
            CorruptCheckpoint: a file is missing or altered.
            UserError: it belongs to another training.
        """
        self.verify(step)
        load_weights(model, self.path(step))
