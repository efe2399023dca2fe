"""`rarec neighbours`: item-item tables that are counted, not trained."""

from functools import partial
from pathlib import Path
from typing import Any

from rarec.config.neighbours import Neighbours
from rarec.stages.run import Run
from rarec.stages.stage import Built, Stage


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

        run = self.run
        config = run.config.neighbours
        n_items = run.dataset.n_items
        engine = partial(open_engine, run.config.prepare, directory / "spill")
        model = config.class_of(self.part)(config.config_of(self.part), engine)
        fits = n_items <= model.largest
        top = model.config.top

        def write() -> None:
            pairs = figures["pairs"] = write_table(model.rows(run.dataset) if fits else (), directory)
            lacking = model.needs if fits else f"more items than neighbours.{model.limit}"
            few = f"; all that there are, fewer than neighbours.top, {top:,}" if top >= n_items else ""
            note = few if pairs else f": {lacking}, so it will add nothing"
            run.say(f"{self.part}: {pairs:,} neighbours of {n_items:,} items{note}")

        figures: dict[str, int] = {}
        run.world.run_on_main(write)
        return Built(figures)
