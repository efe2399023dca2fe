"""ID models trained by sampled softmax: the strong recipe of 2024-25 (Klenitskiy & Vasilev 2023; eSASRec 2025).

Shape letters: N items, R those met in training, B windows, E dimension.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rarec.config.ids import Recipe
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.ids.objective import WithItems, draw_negatives
from rarec.ids.progress import load_progress, save_progress
from rarec.ids.users import SequenceUsers
from rarec.ids.validation import Validation
from rarec.ids.windows import Windows
from rarec.ranking.metrics import SELECTED_BY

Say = Callable[[str], None]
Floats = npt.NDArray[np.float32]
SAY_EVERY = 10.0
"""Seconds between lines about the progress."""


@dataclass(frozen=True)
class Trained:
    """The best epoch.

    Attributes:
        items_NE: the item table.
        users: the model.
        figures: what the training was, for the manifest.
    """

    items_NE: Floats
    users: SequenceUsers
    figures: dict[str, Any]


def train_ids(
    dataset: PreparedDataset, settings: Recipe, seed: int, progress: Path, identity: str, say: Say
) -> Trained:
    """Train on each user's training part until validation NDCG@100 rests for `patience` epochs; keep the best epoch.

    After every epoch the whole state is written to `progress`, and a killed training goes on from there. An epoch's
    random choices depend on the seed and its number alone, so it ends with the same weights, bit for bit, as one that
    was not killed (on the same machine with the same number of threads).

    Args:
        dataset: prepared.
        settings: the recipe.
        seed: of weights, order, cuts, dropout and negatives.
        progress: file of the state; left in place for the caller to delete once the result is safe.
        identity: of dataset, settings and seed; progress of another identity is discarded, and said so.
        say: tells the user a line.

    Raises:
        UserError: the loss is not finite (naming epoch and batch), or there is nothing to train or validate on.
    """
    windows, validation = Windows(dataset, settings.max_history), Validation(dataset, seed)
    if not windows.targets_U.size:
        remedy = "loosen the split, or set ids.holdout to 0: it takes one of each user's away"
        raise UserError(f"{dataset.directory}: the ID model has no user with two training interactions", remedy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        training = _Training(settings, torch.from_numpy(dataset.train_counts_N > 0), seed)
        training.resume(progress, identity, say)
        said = time.monotonic()
        while not training.is_done:
            training.epoch(windows, validation)
            training.save(progress, identity)
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                say(training.line)
        say(training.line)
        return training.best()


class _Training:
    """The state of a training, and its steps: epoch, save, resume."""

    def __init__(self, settings: Recipe, met_N: torch.Tensor, seed: int) -> None:
        self.settings, self.met_R, self.seed = settings, torch.nonzero(met_N)[:, 0], seed
        self.model = WithItems(settings, met_N)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr, fused=True)
        self.best_weights: dict[str, torch.Tensor] = {}
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0

    @property
    def best_epoch(self) -> int:
        """Index of the epoch with the best validation NDCG@100, the first among equals."""
        return int(np.argmax([point[SELECTED_BY] for point in self.curve]))

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

    def epoch(self, windows: Windows, validation: Validation) -> None:
        """Train one epoch and validate."""
        start = time.monotonic()
        rng = np.random.default_rng([self.seed, len(self.curve)])
        torch.manual_seed(int(rng.integers(2**62)))
        losses = [
            self.step(torch.from_numpy(rows), torch.from_numpy(lengths_B), batch)
            for batch, (rows, lengths_B) in enumerate(windows.batches(self.settings.batch_size, rng))
        ]
        users = SequenceUsers(self.model.encoder)
        figures = validation(self.model.items.weight.detach().numpy(), users)
        self.curve.append({"loss": float(np.mean(losses)), **figures})
        if self.best_epoch == len(self.curve) - 1:
            self.best_weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.seconds += time.monotonic() - start

    def step(self, rows: torch.Tensor, lengths_B: torch.Tensor, batch: int) -> float:
        """One batch; its loss."""
        loss = self.model.loss(rows, lengths_B, draw_negatives(self.met_R, self.settings.negatives))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"{self.settings.title}: the loss is {value} in epoch {len(self.curve) + 1}, batch {batch + 1}",
                f"lower ids.{self.settings.kind}.lr (now {self.settings.lr:g}); the epochs before are kept",
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value

    def save(self, path: Path, identity: str) -> None:
        """Write weights, the best weights, Adam's state and the curve."""
        tensors = {f"model.{name}": weight for name, weight in self.model.state_dict().items()}
        tensors |= {f"best.{name}": weight for name, weight in self.best_weights.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
        save_progress(path, tensors, {"identity": identity, "curve": self.curve, "seconds": self.seconds})

    def resume(self, path: Path, identity: str, say: Say) -> None:
        """Go on from a progress file, if there is one of this very training."""
        loaded = load_progress(path)
        if loaded is None:
            return
        tensors, state = loaded
        if state["identity"] != identity:
            say(f"{path} is of another training (other data, settings or seed): starting anew")
            return
        self.model.load_state_dict(_under("model.", tensors))
        self.best_weights = _under("best.", tensors)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _under("adam.", tensors).items():
            index, _, field = name.partition(".")
            moments.setdefault(int(index), {})[field] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.curve, self.seconds = state["curve"], state["seconds"]
        say(f"going on after epoch {len(self.curve)}")

    def best(self) -> Trained:
        """The best epoch's weights, with figures."""
        self.model.load_state_dict(self.best_weights)
        figures = {
            "validation": {name: value for name, value in self.curve[self.best_epoch].items() if name != "loss"},
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "seconds": round(self.seconds, 1),
            "epochs": len(self.curve),
            "best_epoch": self.best_epoch + 1,
            "curve": self.curve,
        }
        return Trained(self.model.items.weight.detach().numpy(), SequenceUsers(self.model.encoder.eval()), figures)


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
