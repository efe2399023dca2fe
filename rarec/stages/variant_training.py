"""One variant's training, put together from the rooms below: samples, model, engine, loss, validation, log."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from rarec.config import Variant
from rarec.console.last_resort import stop_signals
from rarec.data.shards.batch_plan import BatchPlan
from rarec.data.shards.files import INDEX, open_samples
from rarec.data.shards.loader import BatchLoader, Feed
from rarec.data.shards.samples import REPAIR
from rarec.data.tables import map_npy
from rarec.models.build import aligned_blocks, slots_reserved, trained_parameters, whole_size
from rarec.models.initialise import Initialiser
from rarec.models.losses import Objective
from rarec.models.towers import RaRec
from rarec.ranking.metrics import validation_metrics
from rarec.ranking.rank import EvalBatch
from rarec.stages.run import Run
from rarec.stages.shard_content import ITEM_STATES, TARGET_COUNTS
from rarec.training.accelerator import build_accelerator
from rarec.training.batches import Collator, initial_samples
from rarec.training.loop import Checkpoints, Trainer, TrainingState
from rarec.training.step_metrics import TrainingLog


def train_variant(run: Run, variant: Variant, directory: Path, checkpoints: Checkpoints) -> tuple[dict[str, Any], str]:
    """Train one variant, or resume its training; return figures for the manifest, and a message if a signal came.

    Everything that can be refused is refused before anything is written.

    Args:
        run: of the variant.
        variant: to train.
        directory: for its log, and the record of samples that are left out.
        checkpoints: of this training.
    """
    config, world = run.config.train, run.world
    world.report(f"loading the model of variant {variant.name}", 0)
    for each in run.config.variants.values():
        aligned_blocks(run.config, each, len(run.llm.backbone.blocks))
    # The other files are the tars, whose samples are checked one by one.
    world.run_on_main(lambda: run.stage("shards").checked(ITEM_STATES, TARGET_COUNTS, INDEX))
    feed = open_feed(run)
    excluded = feed.exclusions(directory, bool(checkpoints.steps()), world)
    plan = feed.plan(excluded)
    plan.check_world_size(world.size * config.accumulate, config.epochs)
    accelerator = build_accelerator(world, config.trackers, directory) if world.is_main else None
    world.run_on_main(lambda: feed.record(directory, excluded))
    state = _resumed(run, checkpoints)
    trainer = build_trainer(run, variant, feed, plan, checkpoints, state)
    trained = sum(map(whole_size, trained_parameters(trainer.model).values()))
    stopped = _fit(variant, directory / "log.jsonl", trainer, state, accelerator)
    best = f"{state.best_value:.4f} at step {state.best_step} of {state.step}"
    run.say(f"{variant.title}: best validation NDCG@100 {best}")
    stop = f"{variant.title} is trained; a signal asked to stop before the next stage"
    figures = {**asdict(state), "trainable_parameters": trained, "skipped_samples": len(excluded)}
    return figures, stop if world.all_reduce_max(int(stopped)) else ""


def _fit(variant: Variant, log: Path, trainer: Trainer, state: TrainingState, accelerator: Accelerator | None) -> bool:
    """Train to the end, or until a signal comes; return whether one came too late to stop this training."""
    if accelerator is not None:
        accelerator.init_trackers("log")
    try:
        with stop_signals() as signals:
            trainer.run(state, TrainingLog(log, accelerator, trainer.steps, state.step, variant.name), signals)
            return bool(signals)
    finally:
        trainer.optimisation.end()
        for tracker in accelerator.trackers if accelerator is not None else ():
            tracker.finish()  # not `end_training`, which ends the process group as well


def _resumed(run: Run, checkpoints: Checkpoints) -> TrainingState:
    """Return the state of the newest whole checkpoint, as rank 0 finds it; a new one where there is none."""
    world = run.world
    step = world.run_on_all(lambda: checkpoints.newest(run.say) if world.is_main else None)
    newest = world.all_reduce_max(-1 if step is None else step)
    state = checkpoints.state(newest) if newest >= 0 else TrainingState()
    if world.all_reduce_max(int(state.best_step is None)):  # another machine may still list what rank 0 has dropped
        state.forget_best()
    return state


def build_trainer(
    run: Run, variant: Variant, feed: Feed, plan: BatchPlan, checkpoints: Checkpoints, state: TrainingState
) -> Trainer:
    """Put a variant's training together: from its first weights, or from the checkpoint of `state`."""
    config = run.config
    shards = feed.manifest
    world = run.world
    item_states_NLD = map_npy(run.directory("shards") / ITEM_STATES, REPAIR)
    counts_N = torch.from_numpy(np.load(run.directory("shards") / TARGET_COUNTS))
    if state.step:
        model = run.build_model(variant)
        checkpoints.load(model, state.step)
    else:
        initialiser = open_initialiser(run, shards["state_blocks"])
        model = initialiser.new_model(variant, lambda n: initial_samples(feed.first_samples(plan, n), run.prompts))
    optimisation = run.engine.train(model, config.train)
    collate = Collator(model, run.prompts, run.sample_sources, item_states_NLD, config.alignment.id_dropout)
    return Trainer(
        config.train,
        config.run.seed,
        model,
        optimisation,
        Objective(config.loss, counts_N, tuple(shards["state_blocks"]), world),
        BatchLoader(plan, feed.samples, collate, config.train.stream.workers, world, config.train.accumulate),
        validation(run, model),
        checkpoints,
        world,
        config.train.steps(plan.total_steps(config.train.epochs), trained_parameters(model)),
    )


def open_feed(run: Run) -> Feed:
    """Return the feed of the run's shards, which must be finished."""
    directory = run.directory("shards")
    manifest = run.stage("shards").require()
    user_slots = sum(slots_reserved(run.config, run.shapes)["user"].values())
    samples = open_samples(run.config.train.stream, directory, manifest, run.tar_cache)
    return Feed(run.config, manifest, samples, user_slots, run.say)


def open_initialiser(run: Run, state_blocks: list[int]) -> Initialiser:
    """Return what builds variants before their first step, from the stored states of these blocks."""
    states_NLD = map_npy(run.directory("shards") / ITEM_STATES, REPAIR)
    return Initialiser(
        run.config, run.build_model, run.prompts, run.sources, state_blocks, states_NLD, run.engine.serving, run.world
    )


def validation(run: Run, model: RaRec) -> Callable[[], dict[str, float]]:
    """Return a function that ranks the full catalogue for a fixed subset of validation users with the current model."""
    dataset, config = run.dataset, run.config
    batch = EvalBatch.of(dataset, dataset.targets("validation", config.train.validation_users, config.run.seed))
    encoder = run.encoder(model)
    return lambda: validation_metrics(encoder.ranker().ranks(batch, run.world))
