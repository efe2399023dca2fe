"""Train an ID model with sampled softmax: the strong recipe of 2024-25 (Klenitskiy & Vasilev 2023; eSASRec 2025).

Each rank encodes its share of a batch and holds its share of the item table; the encoder, which is small, is on all.

Shape letters: N items, R items that occur in training, U items of a step, M negatives, E dimension.
"""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rarec.config.ids import Recipe
from rarec.console.progress import Task
from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ids.models import build
from rarec.ids.objective import Batch, SampledSoftmax, Windows, draw_negatives
from rarec.ids.source import ITEMS_FILE, MODEL_FILE
from rarec.ids.table import ItemTable
from rarec.ids.validation import Validation
from rarec.ranking.metrics import SELECTED_BY
from rarec.storage.checkpoint_store import CheckpointStore
from rarec.storage.directories import discard, refuse_foreign

Say = Callable[[str], None]
KEPT = 2
"""Newest checkpoints kept, beside the best: if the newest is damaged, training resumes from the one before it."""
_TENSORS = "training.safetensors"


def train_ids(
    dataset: PreparedDataset,
    settings: Recipe,
    seed: int,
    checkpoints: CheckpointStore,
    directory: Path,
    say: Say,
    world: World = SINGLE,
    start: Path | None = None,
) -> dict[str, Any]:
    """Train on each user's training part with early stopping; write the item table and the model of the best epoch.

    Training stops when validation NDCG@100 has not improved for `patience` epochs. After every epoch the whole state is
    saved as a checkpoint, from which a killed training resumes, on any number of ranks. The random numbers of an epoch
    depend on the seed and the epoch's number alone, so a resumed training ends with the same weights, bit for bit, as
    an uninterrupted one on as many ranks (on the same machine with the same number of threads); on another number of
    ranks its losses differ by rounding.

    Args:
        dataset: prepared.
        settings: the recipe.
        seed: of weights, order, cuts, dropout and negatives.
        checkpoints: of this training; kept, for the caller to delete once the artefact is whole. Checkpoints of another
            training are reported and deleted.
        directory: gets `items.npy` and `model.safetensors`.
        say: prints one line to the user.
        world: device and ranks; all of them call this.
        start: directory of a finished training, whose model this one goes on from; its own first values by default.

    Returns:
        Figures of the training, for the manifest.

    Raises:
        UserError: the loss is not finite (the message names epoch and batch), or no user can train or validate.
    """
    windows = Windows(dataset, settings.max_history)
    validation = Validation(dataset, seed)
    if not windows.targets_U.size:
        remedy = "loosen the split, or set ids.holdout to 0: it takes one interaction of each user"
        raise UserError(f"{dataset.directory}: no user has two training interactions for the ID model", remedy)
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        torch.manual_seed(seed)
        training = Training(settings, dataset.train_counts_N > 0, seed, checkpoints, world)
        if not training.resume(say) and start is not None:
            training.start_from(start)
        with Task(f"epochs of {settings.title}", settings.epochs, len(training.curve)) as shown:
            while not training.is_done:
                training.epoch(windows, validation)
                last = training.curve[-1]
                shown.update(len(training.curve), f"loss {last['loss']:.3f}, {SELECTED_BY} {last[SELECTED_BY]:.4f}")
        say(training.summary)
        world.run_on_main(lambda: training.write_best(directory))
        return training.figures


class Training:
    """The state of a training, and its steps: epoch, save, resume.

    Args:
        settings: the recipe.
        trained_N: marks items that occur in training.
        seed: of weights and epochs. All ranks must have drawn alike from PyTorch's generator.
        checkpoints: to save to and resume from.
        world: device and ranks.
    """

    def __init__(
        self, settings: Recipe, trained_N: np.ndarray[Any, Any], seed: int, checkpoints: CheckpointStore, world: World
    ) -> None:
        self.settings, self.seed, self.checkpoints, self.world = settings, seed, checkpoints, world
        self.trained_R = torch.from_numpy(np.flatnonzero(trained_N))
        self.encoder = build(settings).to(world.device)
        self.objective = SampledSoftmax(self.encoder, world, getattr(torch, settings.dtype))
        weights: list[torch.Tensor] = [*self.encoder.parameters()]
        weights = weights or [torch.zeros(0)]  # a model of the user's own may have none, which Adam refuses
        self.adam = torch.optim.Adam(weights, lr=settings.lr, fused=True)
        self.table = ItemTable(trained_N, settings.dim, settings.lr, seed, world)
        self.curve: list[dict[str, float]] = []
        self.steps, self.seconds = 0, 0.0

    @property
    def best_epoch(self) -> int:
        """The number of the epoch with the best ranking so far, from 1."""
        return 1 + max(range(len(self.curve)), key=lambda epoch: self.curve[epoch][SELECTED_BY])

    @property
    def is_done(self) -> bool:
        """Return whether all epochs are trained, or none of the last `patience` was better."""
        epochs = len(self.curve)
        return epochs > 0 and (epochs >= self.settings.epochs or epochs - self.best_epoch >= self.settings.patience)

    @property
    def summary(self) -> str:
        """The line that the user reads at the end."""
        last, best = self.curve[-1], self.curve[self.best_epoch - 1]
        return (
            f"{self.settings.title} epoch {len(self.curve)}: loss {last['loss']:.3f}, "
            f"validation {SELECTED_BY} {last[SELECTED_BY]:.4f} "
            f"(best {best[SELECTED_BY]:.4f} at epoch {self.best_epoch}), {self.seconds:.0f} s"
        )

    @property
    def figures(self) -> dict[str, Any]:
        """The figures of the training for the manifest."""
        weights = sum(weight.numel() for weight in self.encoder.parameters())
        best = self.curve[self.best_epoch - 1]
        return {
            "validation": {name: value for name, value in best.items() if name != "loss"},
            "parameters": weights + self.table.n_items * self.settings.dim,
            "seconds": round(self.seconds, 1),
            "epochs": len(self.curve),
            "best_epoch": self.best_epoch,
            "curve": self.curve,
        }

    def epoch(self, windows: Windows, validation: Validation) -> None:
        """Train one epoch, validate, and save a checkpoint."""
        start = time.monotonic()
        rng = np.random.default_rng([self.seed, len(self.curve)])
        torch.manual_seed(int(rng.integers(2**62)))
        batches = windows.batches(self.settings.batch_size, rng)
        losses = [self.step(number, batch) for number, batch in enumerate(batches, 1)]
        self.world.report(f"validating {self.settings.title}")
        figures = validation.of_training(self.encoder, self.table)
        self.curve.append({"loss": float(np.mean(losses)), **figures})
        self.seconds += time.monotonic() - start
        self.save()

    def step(self, number: int, batch: Batch) -> float:
        """Train on one batch, by its number in the epoch; return its loss.

        Raises:
            UserError: the loss is not finite, on all ranks alike.
        """
        settings, world = self.settings, self.world
        self.steps += 1
        world.report(f"training {settings.title}", self.steps)
        negatives_M = draw_negatives(self.trained_R, settings.negatives)
        rows_U = torch.cat([batch.rows_BT.flatten(), negatives_M]).unique().to(world.device)
        vectors_UE = self.table.look_up(rows_U).requires_grad_()

        loss = self.objective(batch.groups(world), negatives_M.to(world.device), rows_U, vectors_UE)
        loss = loss / batch.n_targets  # this rank's part of the mean
        loss.backward()
        trained = [weight for weight in (vectors_UE, *self.encoder.parameters()) if weight.grad is not None]
        loss, *gradients = self._summed([loss, *(cast(torch.Tensor, weight.grad) for weight in trained)])
        value = float(loss)
        if not math.isfinite(value):
            problem = f"{settings.title}: the loss is {value} in epoch {len(self.curve) + 1}, batch {number}"
            raise UserError(problem, f"lower ids.{settings.kind}.lr (now {settings.lr:g})", shared=True)

        for weight, gradient in zip(trained, gradients, strict=True):
            weight.grad = gradient
        self.adam.step()
        self.adam.zero_grad()
        self.table.update(rows_U, gradients[0])
        return value

    def _summed(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the sum of each tensor over all ranks, exchanged in one message."""
        flat = self.world.all_reduce_sum(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def save(self) -> None:
        """Write a checkpoint: the encoder and its moments, the table and its moments, the curve."""
        if not self.world.is_main:
            self.table.save(None)
            return
        tensors = {f"model.{name}": weight for name, weight in self.encoder.state_dict().items()}
        for index, moments in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
        state = {"curve": self.curve, "steps": self.steps, "seconds": self.seconds, "best_step": self.best_epoch}
        with self.checkpoints.writing(len(self.curve), state, self.best_epoch) as temporary:
            save_file(tensors, temporary / _TENSORS)
            self.table.save(temporary)

    def start_from(self, directory: Path) -> None:
        """Take the weights of a finished training, without its moments: this one has a log of its own."""
        self.encoder.load_state_dict(load_file(directory / MODEL_FILE))
        self.table.start_from(directory / ITEMS_FILE)

    def resume(self, say: Say) -> bool:
        """Load the newest whole checkpoint of this training; return whether there is one."""
        newest = self.world.run_on_all(lambda: _newest(self.checkpoints, say) if self.world.is_main else 0)
        epoch = self.world.all_reduce_max(newest)
        if not epoch:
            return False
        tensors = load_file(self.checkpoints.path(epoch) / _TENSORS)
        state = self.checkpoints.read_state(epoch)
        self.encoder.load_state_dict(_under("model.", tensors))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _under("adam.", tensors).items():
            index, _, field = name.partition(".")
            moments.setdefault(int(index), {})[field] = value
        self.adam.load_state_dict({**self.adam.state_dict(), "state": moments})
        self.curve, self.steps, self.seconds = (state[name] for name in ("curve", "steps", "seconds"))
        self.table.load(self.checkpoints.path(epoch), self.steps)
        say(f"resuming after epoch {epoch}")
        return True

    def write_best(self, directory: Path) -> None:
        """Write the item table and the model of the best epoch, from its checkpoint."""
        self.checkpoints.verify(self.best_epoch)
        checkpoint = self.checkpoints.path(self.best_epoch)
        shutil.copyfile(checkpoint / ITEMS_FILE, directory / ITEMS_FILE)
        save_file(_under("model.", load_file(checkpoint / _TENSORS)), directory / MODEL_FILE)


def _newest(checkpoints: CheckpointStore, say: Say) -> int:
    """Return the newest whole checkpoint, or 0; all damaged or of another training are reported and deleted.

    Raises:
        UserError: none can be used, and rarec has not made all that is in them: then none is deleted.
    """
    try:
        return checkpoints.newest(say) or 0
    except UserError as error:
        unusable = [checkpoints.path(step) for step in checkpoints.steps()]
        for path in unusable:
            refuse_foreign(path)
        say(f"{error.problem}: starting again")
        for path in unusable:
            discard(path)
        return 0


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
