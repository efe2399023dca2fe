"""`rarec neighbours`: item-item tables that are counted, not trained."""

from pathlib import Path
from typing import Any

from rarec.config.neighbours import Neighbours
from rarec.stages.run import Run
from rarec.stages.run_folder import RunFolder
from rarec.stages.stage import Built, Stage

FIELDS = {
    "cooccurrence": ("top", "longest", "shrinkage"),
    "transition": ("top", "longest", "shrinkage", "steps", "step_decay"),
    "ease": ("top", "ease_penalty", "ease_items"),
    "lexical": ("top", "lexical_items"),
}
"""Fields of the section `neighbours` that shape the table of each model; the others say how users are scored by it."""


def table_settings(model: str, config: Neighbours) -> dict[str, Any]:
    """Return what shapes the table of a neighbour model."""
    return {"model": model, **config.model_dump(mode="json", include=set(FIELDS[model]))}


class NeighboursStage(Stage):
    """The neighbour table of one model."""

    run: Run
    name = "neighbours"
    summary = "Count which items are neighbours: bought together, one after the other, or alike in their words."
    shareable = True

    @classmethod
    def parts(cls, run: RunFolder) -> list[str]:
        """See `Stage`."""
        return list(run.config.neighbours.models)

    def settings(self) -> dict[str, Any]:
        """See `Stage`."""
        return table_settings(self.part, self.run.config.neighbours)

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        return {"prepare": self.run.stage("prepare")}

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        from rarec.neighbours.make import write_neighbours

        run, config = self.run, self.run.config
        figures: dict[str, Any] = {}

        def write() -> None:
            figures.update(write_neighbours(self.part, config.neighbours, config.prepare, run.dataset, directory))
            found = f"{self.part}: {figures['pairs']:,} neighbours of {run.dataset.n_items:,} items"
            run.say(found + self._note(figures))

        run.world.run_on_main(write)
        return Built(figures)

    def _note(self, figures: dict[str, Any]) -> str:
        """Return what a user should know of a table that is not as the configuration asks."""
        config, n_items = self.run.config.neighbours, self.run.dataset.n_items
        if n_items > config.largest(self.part):
            return f": more items than neighbours.{self.part}_items, so it will add nothing"
        if not figures["pairs"]:
            why = "no two items share a word" if self.part == "lexical" else "no user has two different items"
            return f": {why}, so it will add nothing"
        return f"; all that there are, fewer than neighbours.top, {config.top:,}" if config.top >= n_items else ""
