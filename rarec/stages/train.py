"""`rarec train`, `accelerate launch launch/train.py`: train every variant of the configuration at the same budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarec.config import Variant
from rarec.errors import UserError
from rarec.stages.stage import Built, Stage
from rarec.storage.artefacts import sha256_json
from rarec.storage.files import sha256_file

if TYPE_CHECKING:
    from rarec.models.towers import RaRec
    from rarec.stages.run import Run
    from rarec.training.checkpoints import Checkpoints

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
    def parts(cls, run: "Run") -> list[str]:
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

        from rarec.stages.plan import out_of_memory
        from rarec.stages.variant_training import train_variant

        checkpoints = self.checkpoints(directory)
        try:
            figures, stop = train_variant(self.run, self.variant, directory, checkpoints)
        except torch.OutOfMemoryError:
            raise out_of_memory(self.run, self.part) from None
        log = sha256_file(directory / LOG) if self.run.world.is_main else ""
        return Built({**figures, "log": log}, _files(checkpoints, figures["best_step"]), stop)

    def checkpoints(self, directory: Path | None = None) -> "Checkpoints":
        """Return the checkpoints in a directory, by default that of the finished training."""
        from rarec.training.checkpoints import Checkpoints

        belongs_to = sha256_json([self.settings(), self.run.stage("shards").require()["hash"]])
        place = (directory or self.directory) / CHECKPOINTS
        return Checkpoints(place, self.run.config.train.keep, belongs_to)

    @property
    def remedy(self) -> str:
        """See `Stage`: the other variants need not be trained again."""
        return f"train it again: rarec train CONFIG --fresh train.variants=[{self.part}]"

    def best_model(self) -> "RaRec":
        """Return the trained variant at its best validation, for the run's engine to serve.

        Raises:
            UserError: it is not trained, or not as the configuration says now; or its best checkpoint is damaged, or
                not the one that the training's manifest names.
        """
        from rarec.storage.checkpoint_store import CorruptCheckpoint

        manifest, checkpoints = self.require(), self.checkpoints()
        best = manifest["best_step"]
        model = self.run.build_model(self.variant)
        try:
            checkpoints.load(model, best)
        except CorruptCheckpoint as torn:  # a later checkpoint is another model: it must not take the place of this one
            raise UserError(torn.problem, self.remedy) from None
        if _files(checkpoints, best) != manifest["files"]:
            raise UserError(f"{checkpoints.path(best)} is not the best checkpoint of {self.directory}", self.remedy)
        return model.eval()


def _files(checkpoints: "Checkpoints", step: int) -> dict[str, str]:
    """Return the sha256 of each file of a checkpoint, as the training's manifest names them."""
    place = f"{CHECKPOINTS}/{checkpoints.path(step).name}"
    return {f"{place}/{name}": digest for name, digest in checkpoints.digests(step).items()}
