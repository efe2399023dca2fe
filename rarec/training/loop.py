"""The training loop: batch -> towers -> losses -> optimise -> validate; early stopping and full resume."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from rarec.config.schema import Train
from rarec.errors import Stopped, UserError
from rarec.models.objective import Objective
from rarec.models.towers import RaRec
from rarec.ranking.metrics import SELECTED_BY
from rarec.training.batches import Batch
from rarec.training.checkpoints import Checkpoints, TrainingState
from rarec.training.engines import Optimisation, norms
from rarec.training.loader import BatchLoader
from rarec.training.log import TrainingLog
from rarec.training.metrics import Machine, Step, StepOfAll
from rarec.training.schedule import rate_at
from rarec.training.stopping import StopSignals
from rarec.world import World


@dataclass
class Trainer:
    """Everything one variant's training needs.

    Attributes:
        config: the section `train`.
        seed: with (step, rank) it determines every random number, with (epoch, step) the data's order.
        model: under training.
        optimisation: by the engine.
        objective: the loss of a batch.
        loader: this rank's shares of batches, in their order.
        validate: metrics of the model as it is, on the validation users.
        checkpoints: where they go.
        world: all of them.
        steps: how many there are to take.
    """

    config: Train
    seed: int
    model: RaRec
    optimisation: Optimisation
    objective: Objective
    loader: BatchLoader
    validate: Callable[[], dict[str, float]]
    checkpoints: Checkpoints
    world: World
    steps: int

    def run(self, state: TrainingState, log: Callable[[int, int], TrainingLog], signals: StopSignals) -> TrainingState:
        """Train to the end or until validation stops it.

        Args:
            state: where to go on; its moments are taken from its checkpoint.
            log: opens the log, given all steps and those already done.
            signals: that have it stop, after a checkpoint.

        Raises:
            UserError: the loss is no number; the message names the batch, and the last good checkpoint stays.
            Stopped: by a signal.
        """
        if state.step:
            self.optimisation.resume(self.checkpoints.moments(state.step), state.step)
        records, machine = log(self.steps, state.step), Machine.of(self.model, self.world.device)
        self.model.train()
        try:
            with self.loader.open(state.step, self.steps) as batches:
                while state.step < self.steps and state.worse < self.config.patience:
                    step, gradient_norms = self._step(batches, state, signals)
                    epoch = self.loader.plan.epoch_and_step(state.step - 1)[0]
                    rate = self.config.lr * rate_at(state.step - 1, self.steps, self.config.warmup)
                    figures = step.figures(gradient_norms) | machine.figures(step)
                    records.step(state.step, epoch=epoch, lr=rate, **figures)
                    self._validate_and_save(records, state, step.stops)
            if state.best_step is None:  # no step was to be taken, or the best was torn and all steps are done
                self._validate_and_save(records, state, False)
        finally:
            records.close()
        return state

    def _step(
        self, batches: Iterator[Batch], state: TrainingState, signals: StopSignals
    ) -> tuple[StepOfAll, dict[str, float]]:
        """One optimizer step: the method."""
        step = Step()
        for part in range(self.config.accumulate):
            self.world.report("reading samples " + self.loader.due, state.step + 1)
            batch = self._next(batches, step)
            self.world.report("forward and backward")
            self._seed(state.step, part)
            with self.optimisation.part(last=part == self.config.accumulate - 1):
                encoded = self.optimisation({"user": batch.users, "item": batch.items})
                losses = self.objective(self.model, encoded["user"], encoded["item"], batch.targets)
                self.optimisation.backward(losses.total / self.config.accumulate)
            step.add(batch, losses)
        self.world.report("summing up and updating")
        gradient_norms = norms(self.optimisation.gradients())
        of_all = step.over(self.world, signals.came)
        self._raise_if_not_finite(step, of_all, gradient_norms, state)
        self.optimisation.update(rate_at(state.step, self.steps, self.config.warmup))
        of_all = replace(of_all, seconds=time.monotonic() - step.started)
        state.step += 1
        state.seconds += of_all.seconds
        return of_all, gradient_norms

    def _next(self, batches: Iterator[Batch], step: Step) -> Batch:
        started = time.monotonic()
        batch = next(batches).to(self.world.device)
        step.waited += time.monotonic() - started
        return batch

    def _seed(self, step: int, part: int) -> None:
        """LoRA's dropout depends on the place alone, so a resume repeats it."""
        entropy = np.random.SeedSequence([self.seed, step, part, self.world.rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def _validate_and_save(self, records: TrainingLog, state: TrainingState, stops: bool) -> None:
        """Validate when due and at the end; write a checkpoint then, when one is due of itself, and before stopping."""
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
        """At the end, and every so many steps; by default at the end of each epoch."""
        every = self.config.validate_every
        within = step % every if every else self.loader.plan.epoch_and_step(step)[1]
        return step == self.steps or within == 0

    def _raise_if_not_finite(
        self, step: Step, of_all: StepOfAll, gradient_norms: dict[str, float], state: TrainingState
    ) -> None:
        """All ranks see the same sums, so all are here together; the first whose own part is bad names its samples."""
        norm = gradient_norms.get("all", 0.0)
        if math.isfinite(of_all.loss) and math.isfinite(norm):
            return
        what = "gradient" if math.isfinite(of_all.loss) else "loss"
        keys = ", ".join(step.keys[:5]) + (", ..." if len(step.keys) > 5 else "")
        kept = self.checkpoints.steps()
        good = str(self.checkpoints.path(kept[-1])) if kept else "none yet"
        error = UserError(
            f"the {what} of step {state.step} is not a number (recommendation {of_all.recommendation}, "
            f"align {of_all.align}); batch of samples user-position {keys}",
            "lower train.lr, train.lr_slots or train.clip and begin again: rarec train CONFIG --fresh; "
            f"the last good checkpoint is {good}",
        )

        def name_the_samples() -> None:
            if what == "gradient" or not all(losses.isfinite().all() for losses in step.losses):
                raise error

        self.world.run_on_all(name_the_samples)
        raise error  # the parts are numbers, but not their sum
