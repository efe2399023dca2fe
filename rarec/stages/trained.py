"""What training leaves of a variant for later stages: whether it is finished, what identifies it, its best model."""

from typing import Any

from rarec.artefacts import check_files, is_current, read_manifest, sha256_json
from rarec.checkpoint_store import Torn
from rarec.config import Variant
from rarec.config.identity import evaluate_settings, variant_settings
from rarec.errors import UserError
from rarec.models.towers import RaRec
from rarec.stages.context import Context
from rarec.stages.fresh import bare_model
from rarec.stages.shards import finished_shards
from rarec.training.checkpoints import Checkpoints
from rarec.training.finished import read_done, training_hash


def checkpoints_of(context: Context, variant: Variant) -> Checkpoints:
    """Of a training of this variant, as the configuration says it, from the shards that lie here."""
    belongs_to = sha256_json([variant_settings(context.config, variant), finished_shards(context)["hash"]])
    return Checkpoints(context.paths.train(variant.name) / "checkpoints", context.config.train.keep, belongs_to)


def variant_hash(context: Context, variant: Variant) -> str:
    """Identifies a variant's finished training: what shaped it, where it ended, with what weights; not how long it took.

    Raises:
        UserError: it is not trained, not to its end, or otherwise than the configuration now says.
    """
    finished_training(context, variant)
    return training_hash(context.paths.train(variant.name))


def finished_training(context: Context, variant: Variant) -> dict[str, Any]:
    """What `done.json` of a variant says.

    Raises:
        UserError: it is not trained, not to its end, or otherwise than the configuration now says.
    """
    directory = context.paths.train(variant.name)
    is_current(
        directory, "train", variant_settings(context.config, variant), {"shards": finished_shards(context)["hash"]}
    )
    read_manifest(directory, "train")
    return read_done(directory)


def finished_evaluation(context: Context) -> dict[str, Any]:
    """The manifest of an evaluation of the variants as they are trained here now, with every file as it was written.

    Raises:
        UserError: there is none, or it is of other weights or settings, or a file of it is altered.
    """
    config, directory = context.config, context.paths.evaluation
    manifest = read_manifest(directory, "evaluate")
    weights: dict[str, str] = {name: training_hash(context.paths.train(name)) for name in config.train.variants}
    is_current(directory, "evaluate", evaluate_settings(config), weights)
    check_files(directory, manifest)
    return manifest


def best_model(context: Context, variant: Variant) -> RaRec:
    """A trained variant at its best validation, for `context.engine` to serve.

    Raises:
        UserError: it is not trained, not to its end, or otherwise than the configuration now says; or its best
            checkpoint is torn.
    """
    best = finished_training(context, variant)["best_step"]
    model = bare_model(context, variant, context.load_llm(variant))
    try:
        checkpoints_of(context, variant).load(model, best)
    except Torn as torn:  # a later checkpoint is another model: none takes its place in silence
        remedy = f"delete {context.paths.train(variant.name)} and train it again: rarec train CONFIG"
        raise UserError(torn.problem, remedy) from None
    return model.eval()
