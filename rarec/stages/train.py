"""`accelerate launch launch/train.py`: train every variant of the configuration, each at the same budget."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from rarec.artefacts import check_files, write_manifest
from rarec.config import VARIANTS, Variant
from rarec.config.identity import variant_settings
from rarec.data.shards.index import INDEX
from rarec.data.shards.stream import SampleStream
from rarec.errors import Stopped
from rarec.files import write_json
from rarec.models.build import aligned_blocks, trained_parameters, whole_size
from rarec.models.encode import Encoder
from rarec.models.objective import Objective
from rarec.models.towers import RaRec
from rarec.ranking import EvalBatch, Ranker, validation_metrics
from rarec.stages.context import Context, Say
from rarec.stages.feed import Feed
from rarec.stages.fresh import bare_model, fresh_model
from rarec.stages.shards import ITEM_STATES, TARGET_COUNTS, finished_shards
from rarec.stages.trained import checkpoints_of
from rarec.training.accelerator import build_accelerator
from rarec.training.batches import Collator
from rarec.training.checkpoints import Checkpoints, TrainingState
from rarec.training.finished import DONE
from rarec.training.loader import BatchLoader
from rarec.training.log import TrainingLog
from rarec.training.loop import Trainer
from rarec.training.stopping import StopSignals
from rarec.world import World


def train(context: Context) -> None:
    """Make `train/<variant>/` for each variant: checkpoints, log, and `done.json` with the best step."""
    manifest = finished_shards(context)
    read_whole = {name: manifest["files"].get(name) for name in (ITEM_STATES, TARGET_COUNTS, INDEX)}
    # samples are checked one by one
    context.world.run_on_main(lambda: check_files(context.paths.shards, {**manifest, "files": read_whole}))
    feed = Feed(context, manifest)
    if context.engine.advice(context.config.llm):
        context.say(context.engine.advice(context.config.llm))
    for name in context.config.train.variants:
        aligned_blocks(
            context.config, VARIANTS[name], len(context.llm.backbone.blocks)
        )  # refused before the first variant
    for name in context.config.train.variants:
        with context.alone(context.paths.train(name), DONE):
            context.world.report(f"loading the model of variant {name}", 0)
            train_variant(context, VARIANTS[name], feed)


def train_variant(context: Context, variant: Variant, feed: Feed) -> None:
    """Train one variant, or go on with it."""
    directory, config, world = context.paths.train(variant.name), context.config.train, context.world
    settings, made_from = variant_settings(context.config, variant), {"shards": feed.manifest["hash"]}
    begun = context.is_done(directory, "train", settings, made_from)
    if begun and (directory / DONE).exists():
        return
    context.made = True
    checkpoints = checkpoints_of(context, variant)
    excluded = feed.exclusions(directory, begun=begun and bool(checkpoints.steps()))
    stream = feed.stream(excluded)
    stream.plan.check_ranks(world.size * config.accumulate, config.epochs)
    accelerator = build_accelerator(world, config.trackers, directory) if world.is_main else None
    if not begun:  # nothing was written or thrown away before all that can be refused was
        context.start_over(directory)
        world.run_on_main(lambda: write_manifest(_made(directory), "train", settings=settings, made_from=made_from))
    world.run_on_main(lambda: feed.record(directory, excluded))
    state = _resumed(checkpoints, world, context.say)
    trainer = _trainer(context, variant, feed, stream, checkpoints, state)
    figures = {
        "trainable_parameters": sum(map(whole_size, trained_parameters(trainer.model).values())),
        "skipped_samples": len(excluded),
    }
    told = _sit(context, variant, trainer, state, accelerator)
    best = {"best_files": checkpoints.digests(state.best_step) if state.best_step is not None else {}}
    world.run_on_main(lambda: write_json(directory / DONE, {**asdict(state), **figures, **best}))
    context.say(
        f"{variant.title}: best validation NDCG@100 {state.best_value:.4f} at step {state.best_step} of {state.step}"
    )
    if world.all_reduce_max(int(told)):  # in the last validation, when no step was left to end
        raise Stopped(f"{variant.title} is trained; stopped by a signal before what comes next")


def _sit(
    context: Context, variant: Variant, trainer: Trainer, state: TrainingState, accelerator: Accelerator | None
) -> bool:
    """Train to the end, or until a signal says otherwise; returns whether one came too late for that."""
    path = context.paths.train(variant.name) / "log.jsonl"
    if accelerator is not None:
        accelerator.init_trackers("log")
    try:
        with StopSignals().noted() as signals:
            trainer.run(
                state,
                lambda steps, done: TrainingLog(path, accelerator, steps, done, variant.title, context.say),
                signals,
            )
            return signals.came
    finally:
        trainer.optimisation.end()
        for tracker in accelerator.trackers if accelerator is not None else ():
            tracker.finish()  # not `end_training`, which ends the process group as well


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _resumed(checkpoints: Checkpoints, world: World, say: Say) -> TrainingState:
    """Where the newest whole checkpoint stands, as the first rank finds it; a fresh state where there is none."""
    step = world.run_on_all(lambda: checkpoints.newest(say) if world.is_main else None)
    newest = world.all_reduce_max(-1 if step is None else step)
    state = checkpoints.state(newest) if newest >= 0 else TrainingState()
    if world.all_reduce_max(
        int(state.best_step is None)
    ):  # another machine may still list what the first rank has just dropped
        state.forget_best()
    return state


def _trainer(
    context: Context, variant: Variant, feed: Feed, stream: SampleStream, checkpoints: Checkpoints, state: TrainingState
) -> Trainer:
    config, shards, world = context.config, feed.manifest, context.world
    item_states_NLD = np.load(context.paths.shards / ITEM_STATES, mmap_mode="r")
    counts_N = torch.from_numpy(np.load(context.paths.shards / TARGET_COUNTS))
    if state.step:
        model = bare_model(context, variant, context.load_llm(variant))
        checkpoints.load(model, state.step)
    else:
        model = fresh_model(context, variant, shards, item_states_NLD, stream)
    optimisation = context.engine.train(model, config.train)
    collate = Collator(model, context.prompts, context.sources, item_states_NLD, config.alignment.id_dropout)
    return Trainer(
        config.train,
        config.run.seed,
        model,
        optimisation,
        Objective(config.loss, counts_N, tuple(shards["state_blocks"]), world),
        BatchLoader(stream, collate, config.train.stream.workers, world, config.train.accumulate),
        validation(context, model),
        checkpoints,
        world,
        config.train.steps(stream.plan.total(config.train.epochs), trained_parameters(model)),
    )


def validation(context: Context, model: RaRec) -> Callable[[], dict[str, float]]:
    """Return a function that ranks a fixed random subset of validation users with the model in its current state."""
    dataset, config = context.dataset, context.config
    batch = EvalBatch.of(dataset, dataset.targets("validation", config.train.validation_users, config.run.seed))
    encoder = Encoder(model, context.prompts, context.sources, config.evaluate.batch_size, context.world)
    return lambda: validation_metrics(Ranker(encoder.items(), encoder.users).ranks(batch, context.world))
