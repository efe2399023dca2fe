"""The training loop: batch -> towers -> losses -> optimise -> validate; early stopping and full resume."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from rarec.config.schema import Train
from rarec.errors import UserError
from rarec.models.build import trained_parameters
from rarec.models.losses import LossTerms
from rarec.models.objective import Objective
from rarec.models.towers import RaRec
from rarec.training.batches import Batch
from rarec.training.checkpoints import Checkpoints, TrainingState
from rarec.training.loader import BatchLoader
from rarec.training.log import TrainingLog
from rarec.training.schedule import build_optimizer, rate_at, set_rate

SELECTED_BY = "ndcg@10"


@dataclass
class Trainer:
    """Everything one arm's training needs.

    Attributes:
        config: the section `train`.
        seed: with (epoch, step) it determines the data's order and every random number.
        model: on the accelerator's device.
        objective: the loss of a batch.
        loader: batches in their order.
        validate: metrics of the model as it is, on the validation users.
        checkpoints: where they go.
        accelerator: from `build_accelerator`.
    """

    config: Train
    seed: int
    model: RaRec
    objective: Objective
    loader: BatchLoader
    validate: Callable[[], dict[str, float]]
    checkpoints: Checkpoints
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self.parameters = trained_parameters(self.model)
        self.optimizer = build_optimizer(self.parameters, self.config)
        self.plan = self.loader.plan
        every_step = self.plan.total(self.config.epochs)
        self.steps = min(every_step, self.config.max_steps or every_step)
        if set(self.parameters) <= {"log_scale"}:
            self.steps = 0  # a scale alone changes no ranking: nothing to train

    def run(self, log: Callable[[int, int], TrainingLog]) -> TrainingState:
        """Train to the end or until validation stops it, going on from the newest checkpoint.

        Args:
            log: opens the log, given all steps and those already done.

        Raises:
            UserError: the loss is no number; the message names the batch, and the last good checkpoint stays.
        """
        state = self.checkpoints.resume(self.model, self.parameters, self.optimizer)
        records = log(self.steps, state.step)
        self.model.train()
        try:
            with self.loader.open(state.step, self.steps) as batches:
                while state.step < self.steps and state.worse < self.config.patience:
                    self._advance(batches, state, records)
            if not self.checkpoints.steps():
                self._validate_and_save(records, state)
        finally:
            records.close()
        return state

    def _advance(self, batches: Iterator[Batch], state: TrainingState, records: TrainingLog) -> None:
        """Wait for a batch, take the step, and do what is due after it."""
        started = time.monotonic()
        batch = next(batches).to(self.accelerator.device)
        waited = time.monotonic() - started
        losses, norm = self._step(batch, state)
        spent = time.monotonic() - started
        state.seconds += spent
        self._report(records, state, batch, losses, norm, spent, waited)
        self._validate_and_save(records, state)

    def _step(self, batch: Batch, state: TrainingState) -> tuple[LossTerms, float]:
        """One optimizer step: the method."""
        torch.manual_seed(self.seed + state.step)  # LoRA's dropout depends on the step alone, so a resume repeats it
        set_rate(self.optimizer, rate_at(state.step, self.steps, self.config.warmup))
        users, items = self.model(batch.users, batch.items)
        losses = self.objective(self.model, users, items, batch.targets)
        if not math.isfinite(losses.total.item()):
            raise self._not_a_number("loss", losses, batch, state)
        self.accelerator.backward(losses.total)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip))
        if not math.isfinite(norm):
            raise self._not_a_number("gradient", losses, batch, state)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        return losses, norm

    def _validate_and_save(self, records: TrainingLog, state: TrainingState) -> None:
        """Validate when due and at the end; write a checkpoint then, and when one is due of itself."""
        every = self.config.checkpoint_every
        if self._validation_is_due(state.step):
            started = time.monotonic()
            self.model.eval()
            metrics = self.validate()
            self.model.train()
            state.seconds += time.monotonic() - started
            better = metrics[SELECTED_BY] > state.best_value
            state.worse = 0 if better else state.worse + 1
            if better:
                state.best_step, state.best_value = state.step, metrics[SELECTED_BY]
            records.record(state.step, validation=metrics)
        elif not every or state.step % every:
            return
        self.checkpoints.save(self.model, self.parameters, self.optimizer, state)

    def _validation_is_due(self, step: int) -> bool:
        """At the end, and every so many steps; by default at the end of each epoch."""
        every = self.config.validate_every
        within = step % every if every else self.plan.place(step)[1]
        return step == self.steps or within == 0

    def _report(
        self,
        records: TrainingLog,
        state: TrainingState,
        batch: Batch,
        losses: LossTerms,
        norm: float,
        spent: float,
        waited: float,
    ) -> None:
        padded = batch.users.mask_BT.numel() + batch.items.mask_BT.numel()
        figures: dict[str, Any] = {
            "epoch": self.plan.place(state.step - 1)[0],
            "loss": losses.total.item(),
            "recommendation": losses.recommendation.item(),
            "align": losses.align.item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
            "tokens_per_s": batch.tokens / spent,
            "data_wait": waited / spent,
            "padding": 1 - batch.tokens / padded,
        }
        records.record(state.step, **figures)
        records.progress(state.step, figures["loss"], figures["tokens_per_s"], figures["data_wait"])

    def _not_a_number(self, what: str, losses: LossTerms, batch: Batch, state: TrainingState) -> UserError:
        keys = ", ".join(batch.keys[:5]) + (", ..." if len(batch.keys) > 5 else "")
        kept = self.checkpoints.steps()
        good = str(self.checkpoints.path(kept[-1])) if kept else "none yet"
        return UserError(
            f"the {what} of step {state.step} is not a number (recommendation {losses.recommendation.item()}, "
            f"align {losses.align.item()}); batch of samples user-position {keys}",
            "lower train.lr or train.clip and begin again: rarec train CONFIG --fresh; "
            f"the last good checkpoint is {good}",
        )
