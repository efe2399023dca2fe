"""`rarec prepare`: logs to a prepared dataset."""

from pathlib import Path
from typing import Any

from rarec.errors import redacted_setting
from rarec.stages.stage import Built, Stage

COMPUTES = ("engine", "spark", "memory", "scratch")
"""Fields of `prepare` that say how the dataset is computed, not what it is: every engine gives the same."""


class PrepareStage(Stage):
    """Users, items, interactions, the split, and a manifest with the counts of every step."""

    name = "prepare"
    summary = "Logs to a prepared dataset: ids, order, split."
    shareable = True

    def settings(self) -> dict[str, Any]:
        """See `Stage`."""
        config = self.run.config
        left_out: Any = {**dict.fromkeys(COMPUTES, True), "items": {"columns", "date"}}  # a bundle alone has these
        return {"seed": config.run.seed, "prepare": config.prepare.model_dump(mode="json", exclude=left_out)}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: hashes of the log and of the catalogue."""
        from rarec.data.preparation.inputs import input_hashes

        return input_hashes(self.run.config.prepare)

    def location_key(self) -> object:
        """See `Stage`: where tables are known by their names, the engine that knows them."""
        config = self.run.config.prepare
        named = config.interactions.table or config.items.table
        return redacted_setting(config.engine) if named else None

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        from rarec.data.preparation.pipeline import write_dataset

        run = self.run
        figures: dict[str, Any] = {}
        run.world.run_on_main(lambda: figures.update(write_dataset(run.config.prepare, directory, run.say)))
        return Built(figures)

    def verify(self, directory: Path) -> None:
        """Prove that nothing of validation, test or the future can enter training."""
        from rarec.data.dataset import PreparedDataset, check_no_leaks

        check_no_leaks(PreparedDataset.open(directory))
