"""`rarec ids`: train or import the ID embeddings, and import every further source. Training uses all ranks."""

from pathlib import Path
from typing import Any, cast

from rarec.config.ids import IMPORTED_FILES, Ids, Import, Recipe
from rarec.config.neighbours import Graph
from rarec.stages.neighbours import table_settings
from rarec.stages.run import Run
from rarec.stages.stage import Built, Stage
from rarec.storage.artefacts import PROGRESS, sha256_json


class IdsStage(Stage):
    """Vectors of one source: `id`, each of the configuration's `sources`, and the baseline beside a held-out `id`."""

    name = "ids"
    summary = "Train or import ID embeddings."
    claims = ("items.npy", "model.safetensors")
    shareable = True

    def __init__(self, run: Run, part: str) -> None:
        super().__init__(run, part)
        # An import is quick and built in a temporary directory, so one that is refused leaves nothing behind.
        self.resumable = isinstance(self._chosen, Recipe)

    @classmethod
    def parts(cls, run: Run) -> list[str]:
        """See `Stage`."""
        return list(run.config.vectors_by_name)

    @property
    def section(self) -> Ids | Graph | Import:
        """The configuration's section of this source."""
        return self.run.config.vectors_by_name[self.part]

    def settings(self) -> dict[str, Any]:
        """See `Stage`: a recipe and the seed, or how an import makes its user vectors."""
        chosen = self._chosen
        if isinstance(chosen, Recipe):
            section = cast(Ids, self.section)  # sources beside `id` have no recipe
            users = {"kind": section.model, **chosen.model_dump(mode="json")}
            return {"seed": self.run.config.run.seed, "holdout": section.held_out, "users": users}
        if isinstance(chosen, Graph):
            counted = {
                "holdout": self.run.config.ids.held_out,
                **table_settings("transition", self.run.config.neighbours),
            }
            rule = self.run.config.neighbours.model_dump(mode="json", include={"newest", "decay"})
            return {"dim": chosen.dim, "counts": counted, "users": {"kind": "graph", **rule}}
        if chosen.users is not None:
            return {"missing": chosen.missing, "users": {"kind": "table"}}
        rule = {"rule": chosen.user_rule, "half_life": chosen.half_life, "max_history": chosen.max_history}
        return {"missing": chosen.missing, "users": {"kind": "rule", **rule}}

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        return {"prepare": self.run.stage("prepare")}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: hashes of the files that vectors are imported from."""
        from rarec.ids.make import imported_hashes

        return imported_hashes(self.part, self._chosen) if isinstance(self._chosen, Import) else {}

    def location_key(self) -> object:
        """See `Stage`: the names of imported files, and that of a source, but for the baseline, which is an `id`."""
        name = self.part if self.part in self.run.config.sources_by_name else "id"
        chosen = self._chosen
        files = [getattr(chosen, field) for field in IMPORTED_FILES] if isinstance(chosen, Import) else []
        return [name, files]

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        from rarec.ids.make import write_graph, write_source

        run = self.run
        world = run.world
        section = self.section
        seed = run.config.run.seed
        if isinstance(section, Graph):
            figures = world.run_on_all(
                lambda: write_graph(section, run.config, run.dataset, directory) if world.is_main else {}
            )
        else:
            identity = sha256_json([self.settings(), run.dataset.hash])
            progress = directory / PROGRESS
            figures = write_source(self.part, section, run.dataset, directory, seed, progress, identity, run.say, world)
        if not figures:  # of a rank that has only waited
            return Built()
        reached = figures["validation"]
        run.say(
            f"{self.part}: full ranking of {reached['n']} validation users: "
            f"hr@10 {reached['hr@10']:.4f}, ndcg@10 {reached['ndcg@10']:.4f}"
        )
        return Built({"name": self.part, **figures})

    @property
    def _chosen(self) -> Recipe | Graph | Import:
        section = self.section
        return section.chosen if isinstance(section, Ids) else section
