"""Train an ID model with sampled softmax: the strong recipe of 2024-25 (Klenitskiy & Vasilev 2023; eSASRec 2025).

Shape letters: N items, R items that occur in training, B windows, E dimension.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from rarec.checkpoint_store import CheckpointStore
from rarec.config.ids import Recipe
from rarec.data.dataset import PreparedDataset
from rarec.directories import discard
from rarec.errors import UserError
from rarec.ids.sampled_softmax import ModelWithItems, Windows, draw_negatives
from rarec.ids.source import ITEMS_FILE, SequenceUsers, UserVectors, ranker_of
from rarec.progress import task
from rarec.ranking import EvalBatch, validation_metrics
from rarec.ranking.metrics import SELECTED_BY

Say = Callable[[str], None]
Floats = npt.NDArray[np.float32]
VALIDATION_LIMIT = 10_000
"""Validation users, a fixed random subset: with this many, NDCG@100 is known to better than 0.003."""
VALIDATION_CHUNK = 1024
"""Validation users ranked at a time. Another size may round scores differently."""
KEPT = 2
"""Checkpoints kept: if the newest is damaged, training resumes from the one before it."""
_TENSORS = "training.safetensors"


class Validation:
    """Rank the validation targets of a prepared dataset in the full catalogue.

    Args:
        dataset: prepared.
        seed: of the random subset of users.

    Raises:
        UserError: no user has a validation target.
    """

    def __init__(self, dataset: PreparedDataset, seed: int) -> None:
        self.batch = EvalBatch.of(dataset, dataset.targets("validation", VALIDATION_LIMIT, seed))
        if len(self.batch.user_rows) == 0:
            raise UserError(
                f"{dataset.directory}: no user has a validation target",
                "lower prepare.min_user_interactions, or raise prepare.split.validation_share",
            )

    def __call__(self, items_NE: Floats, users: UserVectors) -> dict[str, float]:
        """Return mean HR, NDCG and MRR, and `n`, the number of users."""
        ranks = ranker_of(items_NE, users).ranks(self.batch, users_at_a_time=VALIDATION_CHUNK)
        return {"n": len(ranks), **validation_metrics(ranks)}


def train_ids(
    dataset: PreparedDataset, settings: Recipe, seed: int, checkpoints: CheckpointStore, directory: Path, say: Say
) -> dict[str, Any]:
    """Train on each user's training part with early stopping; write the item table and the model of the best epoch.

    Training stops when validation NDCG@100 has not improved for `patience` epochs. After every epoch the whole state is
    saved as a checkpoint, from which a killed training resumes. The random numbers of an epoch depend on the seed and
    the epoch's number alone, so a resumed training ends with the same weights, bit for bit, as an uninterrupted one (on
    the same machine with the same number of threads).

    Args:
        dataset: prepared.
        settings: the recipe.
        seed: of weights, order, cuts, dropout and negatives.
        checkpoints: of this training; kept, for the caller to delete once the artefact is whole. Checkpoints of another
            training are reported and deleted.
        directory: gets `items.npy` and `model.safetensors`.
        say: prints one line to the user.

    Returns:
        Figures of the training, for the manifest.

    Raises:
        UserError: the loss is not finite (the message names epoch and batch), or no user can train or validate.
    """
    windows, validation = Windows(dataset, settings.max_history), Validation(dataset, seed)
    if not windows.targets_U.size:
        remedy = "loosen the split, or set ids.holdout to 0: it takes one interaction of each user"
        raise UserError(f"{dataset.directory}: no user has two training interactions for the ID model", remedy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        training = _Training(settings, torch.from_numpy(dataset.train_counts_N > 0), seed)
        training.resume(checkpoints, say)
        with task(f"epochs of {settings.title}", settings.epochs, len(training.curve)) as shown:
            while not training.is_done:
                training.epoch(windows, validation)
                training.save(checkpoints)
                shown.update(len(training.curve), training.facts)
        say(training.line)
        training.write_best(directory)
        return training.figures


class _Training:
    """The state of a training, and its steps: epoch, save, resume."""

    def __init__(self, settings: Recipe, trained_N: torch.Tensor, seed: int) -> None:
        self.settings, self.trained_R, self.seed = settings, torch.nonzero(trained_N)[:, 0], seed
        self.model = ModelWithItems(settings, trained_N)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr, fused=True)
        self.best_weights: dict[str, torch.Tensor] = {}
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0

    @property
    def best_epoch(self) -> int:
        return max(range(len(self.curve)), key=lambda epoch: self.curve[epoch][SELECTED_BY])

    @property
    def is_done(self) -> bool:
        epochs = len(self.curve)
        return epochs > 0 and (epochs >= self.settings.epochs or epochs - 1 - self.best_epoch >= self.settings.patience)

    @property
    def line(self) -> str:
        last, best = self.curve[-1], self.curve[self.best_epoch]
        return (
            f"{self.settings.title} epoch {len(self.curve)}: loss {last['loss']:.3f}, "
            f"validation {SELECTED_BY} {last[SELECTED_BY]:.4f} "
            f"(best {best[SELECTED_BY]:.4f} at epoch {self.best_epoch + 1}), {self.seconds:.0f} s"
        )

    @property
    def facts(self) -> str:
        last = self.curve[-1]
        return f"loss {last['loss']:.3f}, {SELECTED_BY} {last[SELECTED_BY]:.4f}"

    @property
    def figures(self) -> dict[str, Any]:
        return {
            "validation": {name: value for name, value in self.curve[self.best_epoch].items() if name != "loss"},
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "seconds": round(self.seconds, 1),
            "epochs": len(self.curve),
            "best_epoch": self.best_epoch + 1,
            "curve": self.curve,
        }

    def epoch(self, windows: Windows, validation: Validation) -> None:
        """Train one epoch and validate."""
        start = time.monotonic()
        rng = np.random.default_rng([self.seed, len(self.curve)])
        torch.manual_seed(int(rng.integers(2**62)))
        losses = [
            self.step(torch.from_numpy(rows), torch.from_numpy(lengths_B), batch)
            for batch, (rows, lengths_B) in enumerate(windows.batches(self.settings.batch_size, rng))
        ]
        figures = validation(self.model.items.weight.detach().numpy(), SequenceUsers(self.model.encoder))
        self.curve.append({"loss": float(np.mean(losses)), **figures})
        if self.best_epoch == len(self.curve) - 1:
            self.best_weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.seconds += time.monotonic() - start

    def step(self, rows: torch.Tensor, lengths_B: torch.Tensor, batch: int) -> float:
        """Train on one batch; return its loss."""
        loss = self.model.loss(rows, lengths_B, draw_negatives(self.trained_R, self.settings.negatives))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"{self.settings.title}: the loss is {value} in epoch {len(self.curve) + 1}, batch {batch + 1}",
                f"lower ids.{self.settings.kind}.lr (now {self.settings.lr:g})",
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value

    def save(self, checkpoints: CheckpointStore) -> None:
        """Write weights, best weights, Adam's state and the curve."""
        tensors = {f"model.{name}": weight for name, weight in self.model.state_dict().items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best_weights.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
        with checkpoints.writing(len(self.curve), {"curve": self.curve, "seconds": self.seconds}) as aside:
            save_file(tensors, aside / _TENSORS)

    def resume(self, checkpoints: CheckpointStore, say: Say) -> None:
        """Load the newest whole checkpoint of this training, if there is one."""
        epoch = _newest(checkpoints, say)
        if epoch is None:
            return
        tensors, state = load_file(checkpoints.path(epoch) / _TENSORS), checkpoints.read_state(epoch)
        self.model.load_state_dict(_under("model.", tensors))
        self.best_weights = _under("best.", tensors)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _under("adam.", tensors).items():
            index, _, field = name.partition(".")
            moments.setdefault(int(index), {})[field] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.curve, self.seconds = state["curve"], state["seconds"]
        say(f"resuming after epoch {epoch}")

    def write_best(self, directory: Path) -> None:
        """Write the item table and the model of the best epoch."""
        self.model.load_state_dict(self.best_weights)
        np.save(directory / ITEMS_FILE, self.model.items.weight.detach().numpy())
        SequenceUsers(self.model.encoder).save(directory)


def _newest(checkpoints: CheckpointStore, say: Say) -> int | None:
    """Return the newest whole checkpoint; where all are damaged or of another training, report it and delete them."""
    try:
        return checkpoints.newest(say)
    except UserError as error:
        say(f"{error.problem}: starting again")
        for step in checkpoints.steps():
            discard(checkpoints.path(step))
        return None


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
