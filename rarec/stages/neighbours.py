"""`rarec neighbours`: item-item tables that are counted, not trained."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarec.config.neighbours import Neighbours
from rarec.stages.run import Run
from rarec.stages.stage import Built, Stage

if TYPE_CHECKING:
    from rarec.neighbours.base import NeighbourModel


def table_settings(name: str, config: Neighbours) -> dict[str, Any]:
    """Return what shapes the table of a neighbour model."""
    return {"model": config.by_name.get(name, name), **config.config_of(name).model_dump(mode="json")}


class NeighboursStage(Stage):
    """The neighbour table of one model."""

    name = "neighbours"
    summary = "Count which items are neighbours: bought together, one after the other, or alike in their words."
    shareable = True

    @classmethod
    def parts(cls, run: Run) -> list[str]:
        """See `Stage`."""
        return list(run.config.neighbours.by_name)

    def settings(self) -> dict[str, Any]:
        """See `Stage`."""
        return table_settings(self.part, self.run.config.neighbours)

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        return {"prepare": self.run.stage("prepare")}

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        from rarec.data.engines import open_engine
        from rarec.neighbours.base import write_table

        run, config, figures = self.run, self.run.config.neighbours, dict[str, Any]()

        def write() -> None:
            engine = partial(open_engine, run.config.prepare, directory / "spill")
            model: NeighbourModel = config.class_of(self.part)(config.config_of(self.part), engine)
            fits = run.dataset.n_items <= model.largest
            figures["pairs"] = write_table(model.rows(run.dataset) if fits else (), directory)
            summary = f"{self.part}: {figures['pairs']:,} neighbours of {run.dataset.n_items:,} items"
            run.say(summary + self._note(model, figures["pairs"]))

        run.world.run_on_main(write)
        return Built(figures)

    def _note(self, model: "NeighbourModel", pairs: int) -> str:
        """Return what a user should know of a table that is not as the configuration asks."""
        n_items, top = self.run.dataset.n_items, model.config.top
        if n_items > model.largest:
            return f": more items than neighbours.{model.limit}, so it will add nothing"
        if not pairs:
            return f": {model.needs}, so it will add nothing"
        return f"; all that there are, fewer than neighbours.top, {top:,}" if top >= n_items else ""
