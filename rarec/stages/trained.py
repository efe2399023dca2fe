"""What training leaves of an arm for later stages: whether it is finished, what identifies it, its best model."""

from typing import Any

from rarec.artefacts import is_current, read_json, read_manifest, sha256_json
from rarec.config import Arm
from rarec.errors import UserError
from rarec.models.towers import RaRec
from rarec.stages.context import Context
from rarec.stages.fresh import bare_model
from rarec.stages.shards import finished_shards
from rarec.training.checkpoints import Checkpoints

DONE = "done.json"


def arm_settings(context: Context, arm: Arm) -> dict[str, Any]:
    """The configuration that shapes one arm's weights."""
    sections = ["alignment", "readout", "loss", "train", *(["lora"] if arm.lora else [])]
    settings = context.settings(*sections, arm=arm.name)
    for outside in ("arms", "trackers", "keep", "stream"):
        del settings["train"][outside]
    return settings


def checkpoints_of(context: Context, arm: Arm) -> Checkpoints:
    """Of a training of this arm, as the configuration says it, from the shards that lie here."""
    belongs_to = sha256_json([arm_settings(context, arm), finished_shards(context)["hash"]])
    return Checkpoints(context.paths.train(arm.name) / "checkpoints", context.config.train.keep, belongs_to)


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


def best_model(context: Context, arm: Arm) -> RaRec:
    """A trained arm at its best validation, for `context.engine` to serve.

    Raises:
        UserError: it is not trained, not to its end, or otherwise than the configuration now says.
    """
    best = finished_training(context, arm)["best_step"]
    model = bare_model(context, arm, context.load_llm(arm))
    checkpoints_of(context, arm).load(model, best)
    return model.eval()
