"""`accelerate launch launch/train.py`: train every arm of the configuration, each at the same budget."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rarec.artefacts import (
    check_files,
    is_current,
    read_json,
    read_manifest,
    sha256_json,
    write_json,
    write_manifest,
)
from rarec.config import ARMS, Arm
from rarec.data.stream import SampleStream, ShardPlan
from rarec.errors import UserError
from rarec.models.alignment import AlignmentModule
from rarec.models.build import build_model
from rarec.models.encode import Encoder
from rarec.models.initialise import initialise
from rarec.models.load import LoadedModel
from rarec.models.objective import Objective
from rarec.models.towers import RaRec
from rarec.ranking.metrics import metric_values
from rarec.ranking.rank import rank_targets
from rarec.stages.context import Context
from rarec.stages.shards import ITEM_STATES, TARGET_COUNTS, finished_shards
from rarec.training.accelerator import build_accelerator
from rarec.training.batches import Collator
from rarec.training.checkpoints import Checkpoints
from rarec.training.log import TrainingLog
from rarec.training.loop import Trainer

DONE = "done.json"
RIDGE_SAMPLES = 8192
"""At most so many samples' user vectors enter the ridge regression."""


def train(context: Context) -> None:
    """Make `train/<arm>/` for each arm: checkpoints, log, and `done.json` with the best step."""
    manifest = finished_shards(context)
    read_whole = {name: manifest["files"].get(name) for name in (ITEM_STATES, TARGET_COUNTS)}  # tars check themselves
    check_files(context.paths.shards, {**manifest, "files": read_whole})
    for name in context.config.train.arms:
        train_arm(context, ARMS[name], manifest)


def train_arm(context: Context, arm: Arm, shards: dict[str, Any]) -> None:
    """Train one arm, or go on with it."""
    directory = context.paths.train(arm.name)
    settings, made_from = arm_settings(context, arm), {"shards": shards["hash"]}
    context.start_over(directory)
    if context.is_done(directory, "train", settings, made_from):
        if (directory / DONE).exists():
            return
    else:
        directory.mkdir(parents=True, exist_ok=True)
        write_manifest(directory, "train", settings=settings, made_from=made_from)
    accelerator = build_accelerator(context.config.train.trackers, directory)
    item_states_NLD = np.load(context.paths.shards / ITEM_STATES, mmap_mode="r")
    counts_N = torch.from_numpy(np.load(context.paths.shards / TARGET_COUNTS))
    stream = make_stream(context, shards)
    model = fresh_model(context, arm, shards, item_states_NLD, stream).to(accelerator.device)
    checkpoints = Checkpoints(directory / "checkpoints", context.config.train.keep)
    accelerator.init_trackers("log")
    trainer = Trainer(
        context.config.train,
        context.config.run.seed,
        accelerator.prepare(model),
        Objective(context.config.loss, counts_N, tuple(shards["state_blocks"])),
        stream,
        Collator(model, context.prompts, context.sources, item_states_NLD),
        validation(context, model, accelerator.device),
        checkpoints,
        accelerator,
    )
    state = trainer.run(
        lambda steps, done: TrainingLog(directory / "log.jsonl", accelerator, steps, done, arm.title, context.say)
    )
    accelerator.end_training()
    figures = {"trainable_parameters": sum(p.numel() for p in trainer.parameters.values())}
    best = checkpoints.digests(state.best_step) if state.best_step is not None else {}
    write_json(directory / DONE, {**asdict(state), **figures, "best_files": best})
    context.say(
        f"{arm.title}: best validation NDCG@10 {state.best_value:.4f} at step {state.best_step} of {state.step}"
    )


def arm_settings(context: Context, arm: Arm) -> dict[str, Any]:
    """The configuration that shapes one arm's weights."""
    sections = ["alignment", "readout", "loss", "train", *(["lora"] if arm.lora else [])]
    settings = context.settings(*sections, arm=arm.name)
    for outside in ("arms", "trackers", "keep"):
        del settings["train"][outside]
    return settings


def arm_hash(context: Context, arm: Arm) -> str:
    """Identifies an arm's finished training: what shaped it, where it ended, with what weights; not how long it took.

    Raises:
        UserError: it is not trained, not to its end, or otherwise than the configuration now says.
    """
    done = finished_training(context, arm)
    own = {name: value for name, value in done.items() if name != "seconds"}
    return sha256_json([read_manifest(context.paths.train(arm.name), "train")["hash"], own])


def finished_training(context: Context, arm: Arm) -> dict[str, Any]:
    """What `done.json` of an arm says.

    Raises:
        UserError: it is not trained, not to its end, or otherwise than the configuration now says.
    """
    directory = context.paths.train(arm.name)
    is_current(directory, "train", arm_settings(context, arm), {"shards": finished_shards(context)["hash"]})
    read_manifest(directory, "train")
    if not (directory / DONE).exists():
        raise UserError(f"{directory} holds no finished training", "go on with it: rarec train CONFIG")
    done = read_json(directory / DONE)
    if not isinstance(done, dict) or not isinstance(done.get("best_step"), int):
        raise UserError(f"{directory / DONE} names no best step", "train it again: rarec train CONFIG --fresh")
    return done


def bare_model(context: Context, arm: Arm, loaded: LoadedModel) -> RaRec:
    """An arm's towers, their weights not yet set."""
    return build_model(context.config, arm, loaded, context.shapes, context.prompts.sources)


def best_model(context: Context, arm: Arm) -> RaRec:
    """A trained arm at its best validation, ready to encode.

    Raises:
        UserError: it is not trained, not to its end, or otherwise than the configuration now says.
    """
    best = finished_training(context, arm)["best_step"]
    model = bare_model(context, arm, context.load_llm(arm))
    Checkpoints(context.paths.train(arm.name) / "checkpoints", context.config.train.keep).load(model, best)
    return model.to(context.device).eval()


def make_stream(context: Context, shards: dict[str, Any]) -> SampleStream:
    """The training samples in the order that the seed gives."""
    plan = ShardPlan(shards["shards"], context.config.train.batch_size, context.config.run.seed)
    return SampleStream(context.paths.shards, plan)


def fresh_model(
    context: Context,
    arm: Arm,
    shards: dict[str, Any],
    item_states_NLD: npt.NDArray[np.floating],
    stream: SampleStream,
) -> RaRec:
    """An arm before its first step: alignment initialised from the text-only states."""
    model = bare_model(context, arm, context.load_llm(arm))
    seed = context.config.run.seed
    for side, alignment in (("user", model.user.alignment), ("item", model.item.alignment)):
        if alignment is not None:
            generator = torch.Generator().manual_seed(seed + (side == "item"))
            pairs = _item_pairs if side == "item" else _user_pairs
            _initialise(context, alignment, partial(pairs, context, stream), item_states_NLD, shards, generator)
    return model


Pairs = Callable[[str], tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]]


def _initialise(
    context: Context,
    alignment: AlignmentModule,
    pairs: Pairs,
    item_states_NLD: npt.NDArray[np.floating],
    shards: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """Each source from its pairs of vectors and texts; a block without stored states takes the nearest block's."""
    stored = np.array(shards["state_blocks"])
    nearest = [int(np.abs(stored - block).argmin()) for block in alignment.blocks]
    config = context.config.alignment
    penalty = config.ridge if config.init == "ridge" else None
    for name, source in alignment.named_sources():
        vectors_NE, item_rows = pairs(name)
        states_LND = torch.from_numpy(item_states_NLD[item_rows][:, nearest].astype(np.float32)).transpose(0, 1)
        vectors = torch.from_numpy(np.ascontiguousarray(vectors_NE, np.float32))
        initialise(source, vectors, states_LND, penalty=penalty, generator=generator)


def _item_pairs(context: Context, stream: SampleStream, source: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Items with their own texts."""
    return context.sources[source].items_NE[:], np.arange(context.dataset.n_items)


def _user_pairs(context: Context, stream: SampleStream, source: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Users of the first training batches with the texts of their targets."""
    samples = []
    for batch in stream.epoch(0):
        samples += batch
        if len(samples) >= RIDGE_SAMPLES:
            break
    vectors_NE = np.stack([sample.vectors[source].mean(0) for sample in samples])
    return vectors_NE, np.array([sample.target for sample in samples])


def validation(context: Context, model: RaRec, device: torch.device) -> Callable[[], dict[str, float]]:
    """Ranking metrics of the model as it is, over the full catalogue, on a fixed random subset of validation users."""
    dataset, config = context.dataset, context.config
    targets = dataset.targets("validation", config.train.validation_users, config.run.seed)
    histories = [dataset.history(int(u), int(p)) for u, p in zip(targets.user_rows, targets.positions, strict=True)]
    encoder = Encoder(model, context.prompts, context.sources, config.evaluate.batch_size, device)

    def validate() -> dict[str, float]:
        users_BZ, items_NZ = encoder.users(targets.user_rows, histories), encoder.items()
        ranks_B = rank_targets(users_BZ, items_NZ, targets.item_rows, histories)
        return {name: float(values.mean()) for name, values in metric_values(ranks_B, [10, 100]).items()}

    return validate
