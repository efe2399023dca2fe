"""The training loop: batch -> towers -> losses -> optimise -> validate; early stopping, checkpoints, and full resume.

A checkpoint holds `alignment.safetensors`, `lora/` if the variant has LoRA, `optimizer.safetensors`, and what every
`CheckpointStore` writes. It has no frozen weight, and does not depend on the number of ranks or the engine that wrote
it: any of them can resume from it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rarec.config.schema import Train
from rarec.data.shards.loader import BatchLoader
from rarec.distributed.world import World
from rarec.errors import Stopped, UserError
from rarec.models.build import Weights, load_weights, save_weights
from rarec.models.losses import Objective
from rarec.models.towers import RaRec
from rarec.ranking.metrics import SELECTED_BY
from rarec.storage.checkpoint_store import CheckpointStore
from rarec.training.batches import Batch
from rarec.training.engines import Optimisation, rate_at
from rarec.training.step_metrics import DeviceMeter, StepAccumulator, StepMetrics, TrainingLog, norms

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
    """The checkpoints of one variant: the newest and the best are kept."""

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


@dataclass
class Trainer:
    """Trains one variant.

    Attributes:
        config: the section `train`.
        seed: with (step, rank) it determines every random number, with (epoch, step) the order of the data.
        model: the model to train.
        optimisation: the model under an engine.
        objective: computes the losses of a batch.
        loader: opens this rank's batches.
        validate: returns the ranking metrics of the model on the validation users.
        checkpoints: reads and writes checkpoints.
        world: all ranks.
        steps: number of steps to take.
    """

    config: Train
    seed: int
    model: RaRec
    optimisation: Optimisation
    objective: Objective
    loader: BatchLoader[Batch]
    validate: Callable[[], dict[str, float]]
    checkpoints: Checkpoints
    world: World
    steps: int

    def run(self, state: TrainingState, records: TrainingLog, signals: Sequence[int]) -> TrainingState:
        """Train to the last step, or until validation stops improving.

        Args:
            state: where to resume; the moments are read from its checkpoint.
            records: the log; it is closed at the end.
            signals: that have arrived: with the first, training stops after a checkpoint.

        Raises:
            UserError: the loss is not finite; the message names the batch, and the last good checkpoint stays.
            Stopped: a signal has arrived.
        """
        try:
            if state.step:
                self.optimisation.resume(self.checkpoints.moments(state.step), state.step)
            meter = DeviceMeter.of(self.model, self.world.device)
            self.model.train()
            with self.loader.open(state.step, self.steps) as batches:
                while state.step < self.steps and state.worse < self.config.patience:
                    metrics, gradient_norms = self._step(batches, state, signals)
                    epoch = self.loader.plan.epoch_and_step(state.step - 1)[0]
                    rate = self.config.lr * rate_at(state.step - 1, self.steps, self.config.warmup)
                    figures = metrics.figures(gradient_norms) | meter.figures(metrics)
                    records.step(state.step, epoch=epoch, lr=rate, **figures)
                    self._validate_and_save(records, state, metrics.stops)
            if state.best_step is None:  # there was no step to take, or the best checkpoint of a whole training is lost
                self._validate_and_save(records, state, False)
        finally:
            records.close()
        return state

    def _step(
        self, batches: Iterator[Batch], state: TrainingState, signals: Sequence[int]
    ) -> tuple[StepMetrics, dict[str, float]]:
        """Take one optimizer step; return its metrics and gradient norms."""
        step = StepAccumulator()
        for part in range(self.config.accumulate):
            self.world.report("reading samples " + self.loader.next_samples, state.step + 1)
            started = time.monotonic()
            batch = next(batches)
            step.waited += time.monotonic() - started
            self.world.report("forward and backward")
            self._seed(state.step, part)
            with self.optimisation.part(last=part == self.config.accumulate - 1):
                encoded = self.optimisation({"user": batch.users, "item": batch.items})
                losses = self.objective(self.model, encoded["user"], encoded["item"], batch.targets)
                self.optimisation.backward(losses.total / self.config.accumulate)
            step.add(batch, losses)
        self.world.report("summing up and updating")
        gradient_norms = norms(self.optimisation.gradients())
        metrics = step.reduce(self.world, bool(signals))
        self._raise_if_not_finite(step, metrics, gradient_norms, state)
        self.optimisation.update(rate_at(state.step, self.steps, self.config.warmup))
        metrics = replace(metrics, seconds=time.monotonic() - step.started)
        state.step += 1
        state.seconds += metrics.seconds
        return metrics, gradient_norms

    def _seed(self, step: int, part: int) -> None:
        """Seed LoRA's dropout from the position alone, so that a resumed training repeats it."""
        entropy = np.random.SeedSequence([self.seed, step, part, self.world.rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def _validate_and_save(self, records: TrainingLog, state: TrainingState, stops: bool) -> None:
        """Validate if it is due; write a checkpoint then, after every `checkpoint_every` steps, and before stopping."""
        every = self.config.checkpoint_every
        if self._validation_is_due(state.step):
            self._validate(records, state)
        elif not stops and (not every or state.step % every):
            return
        self.world.report("writing the checkpoint")
        weights, moments = self.optimisation.weights(), self.optimisation.moments()
        self.world.run_on_main(lambda: self.checkpoints.save(self.model, weights, moments, state))
        if stops and state.step < self.steps:
            raise Stopped(f"stopped by a signal at step {state.step} of {self.steps}, after a checkpoint")

    def _validate(self, records: TrainingLog, state: TrainingState) -> None:
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

    def _validation_is_due(self, step: int) -> bool:
        """Return whether this is the last step, or `validate_every` steps (by default an epoch) have passed."""
        every = self.config.validate_every
        within = step % every if every else self.loader.plan.epoch_and_step(step)[1]
        return step == self.steps or within == 0

    def _raise_if_not_finite(
        self, step: StepAccumulator, metrics: StepMetrics, gradient_norms: dict[str, float], state: TrainingState
    ) -> None:
        """Raise on all ranks, which all see the same sums; the first rank whose own part is bad names its samples."""
        norm = gradient_norms.get("all", 0.0)
        if math.isfinite(metrics.loss) and math.isfinite(norm):
            return
        what = "gradient" if math.isfinite(metrics.loss) else "loss"
        keys = ", ".join(step.keys[:5]) + (", ..." if len(step.keys) > 5 else "")
        saved = self.checkpoints.steps()
        good = str(self.checkpoints.path(saved[-1])) if saved else "none yet"
        error = UserError(
            f"the {what} of step {state.step} is not finite (recommendation {metrics.recommendation}, "
            f"align {metrics.align}, distil {metrics.distil}); batch of samples user-position {keys}",
            "lower train.lr, train.lr_slots or train.clip and start again: rarec train CONFIG --fresh; "
            f"the last good checkpoint is {good}",
        )

        def name_the_samples() -> None:
            if what == "gradient" or not all(losses.isfinite().all() for losses in step.losses):
                raise error

        self.world.run_on_all(name_the_samples)
        raise error  # each rank's part is finite, but not their sum
