"""`rarec train`, `accelerate launch launch/train.py`: train every variant of the configuration at the same budget."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarec.config import Variant
from rarec.errors import UserError
from rarec.stages.run import Run
from rarec.stages.stage import Built, Stage
from rarec.storage.artefacts import MANIFEST, differences, read_manifest, sha256_json
from rarec.storage.checkpoint_store import KIND, STATE
from rarec.storage.files import sha256_file

if TYPE_CHECKING:
    from rarec.models.towers import RaRec
    from rarec.planning.advice import RunPlan
    from rarec.planning.setup import Cluster, EngineName
    from rarec.training.loop import Checkpoints, Trainer

OUTSIDE = ("variants", "trackers", "keep", "stream")
"""Fields of `train` that do not shape a variant's weights."""
CHECKPOINTS, LOG = "checkpoints", "log.jsonl"


class TrainStage(Stage):
    """One trained variant: its best and newest checkpoints, its log, and in the manifest the best step."""

    name = "train"
    summary = "Train every variant (as launch/train.py does on several ranks)."
    resumable = True
    claims = (LOG, "skipped.json", "log/")  # the last is of trackers

    @classmethod
    def parts(cls, run: Run) -> list[str]:
        """See `Stage`."""
        return list(run.config.variants)

    @property
    def variant(self) -> Variant:
        """The variant that is trained."""
        return self.run.config.variant(self.part)

    def settings(self) -> dict[str, Any]:
        """See `Stage`."""
        config = self.run.config
        sections = ["alignment", "readout", "loss", "train", *(["lora"] if self.variant.lora else [])]
        settings: dict[str, Any] = {
            "seed": config.run.seed,
            **config.sections(*sections),
            "variant": self.variant.identity,
        }
        for field in OUTSIDE:
            del settings["train"][field]
        return settings

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        return {"shards": self.run.stage("shards")}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`. The shards must be of the language model and the prompt as they are now; their hash has both."""
        self.run.stage("shards").require(outside=True)
        return {}

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        import torch

        from rarec.planning.advice import out_of_memory
        from rarec.stages.variant_training import train_variant

        run = self.run
        checkpoints = self.checkpoints(directory)
        try:
            figures, stop = train_variant(run, self.variant, directory, checkpoints)
        except torch.OutOfMemoryError:
            raise out_of_memory(self.part, run.engine.name, run.world, partial(plan, run)) from None
        log = sha256_file(directory / LOG) if run.world.is_main else ""
        return Built({**figures, "log": log}, _files(checkpoints.path(figures["best_step"])), stop)

    def checkpoints(self, directory: Path | None = None) -> "Checkpoints":
        """Return the checkpoints in a directory, by default that of the finished training."""
        from rarec.training.loop import Checkpoints

        belongs_to = sha256_json([self.settings(), self.run.stage("shards").require()["hash"]])
        place = (directory or self.directory) / CHECKPOINTS
        return Checkpoints(place, self.run.config.train.keep, belongs_to)

    @property
    def remedy(self) -> str:
        """See `Stage`: the other variants need not be trained again."""
        return f"train it again: rarec train CONFIG --fresh train.variants=[{self.part}]"

    def untrained(self) -> "Trainer":
        """Return the training before its first step, for measurements; damaged samples are not looked for."""
        from rarec.stages.variant_training import build_trainer, open_feed
        from rarec.training.loop import TrainingState

        feed = open_feed(self.run)
        return build_trainer(self.run, self.variant, feed, feed.plan(), self.checkpoints(), TrainingState())

    def best_model(self) -> "RaRec":
        """Return the trained variant at its best validation, for the run's engine to serve.

        Raises:
            UserError: it is not trained, or not as the configuration says now; or a file of its best checkpoint is not
                as the training's manifest says. A later checkpoint is another model and must not replace it.
        """
        from rarec.models.build import load_weights

        manifest = self.require()
        best = self.checkpoints().path(manifest["best_step"])
        if not all(name.startswith(f"{CHECKPOINTS}/{best.name}/") for name in manifest["files"]):
            raise UserError(f"{best} is not the best checkpoint of {self.directory}", self.remedy)
        self.checked()
        model = self.run.build_model(self.variant)
        load_weights(model, best)
        return model.eval()


def _files(checkpoint: Path) -> dict[str, str]:
    """Return the sha256 of each file of a checkpoint, but for its state, which contains how long training took."""
    files = read_manifest(checkpoint, KIND)["files"]
    return {f"{CHECKPOINTS}/{checkpoint.name}/{name}": digest for name, digest in files.items() if name != STATE}


def plan(run: Run, cluster: "Cluster", engine: "EngineName | None") -> "RunPlan":
    """Estimate what training the variants of a run needs; nothing is loaded, and nothing is written.

    Args:
        run: the run.
        cluster: GPUs to train on.
        engine: engine to plan for; None for the recommended one.

    Raises:
        UserError: the language model's configuration or a file of vectors is missing, or the batch is too small.
    """
    from rarec.planning.advice import plan_variants
    from rarec.planning.calculator import Calculator
    from rarec.planning.meta_model import MetaModelBuilder
    from rarec.planning.setup import SampleStats, source_shapes

    stage = run.stage("shards")
    samples = None
    if (stage.directory / MANIFEST).exists():
        manifest = read_manifest(stage.directory, "shards")
        if differences(manifest["settings"], json.loads(json.dumps(stage.settings()))):
            run.say(f"{stage.directory} was made with other settings: the number of samples is unknown")
        else:
            samples = SampleStats.of_shards(stage.directory, manifest, run.config)
    builder = MetaModelBuilder(run.config, source_shapes(run.config), run.converted_llm)
    return plan_variants(Calculator(run.config, builder, samples), list(run.config.variants), cluster, engine)
