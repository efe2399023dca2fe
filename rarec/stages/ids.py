"""`rarec ids`: train or import the ID embeddings, and import every further source."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rarec.artefacts import sha256_json
from rarec.config.ids import IMPORTED_FILES, Ids, Import, Recipe
from rarec.stages.stage import PROGRESS, Built, Stage

if TYPE_CHECKING:
    from rarec.stages.run import Run


class IdsStage(Stage):
    """Vectors of one source: `id`, each of the configuration's `sources`, and the baseline beside a held-out `id`."""

    name = "ids"
    summary = "Train or import ID embeddings."
    claims = ("items.npy", "model.safetensors")
    shareable = True

    def __init__(self, run: "Run", part: str) -> None:
        super().__init__(run, part)
        # An import is quick, and built aside: what was refused in the midst of it leaves nothing behind.
        self.resumable = isinstance(self._chosen, Recipe)

    @classmethod
    def parts(cls, run: "Run") -> list[str]:
        """See `Stage`."""
        return list(run.config.vectors_by_name)

    @property
    def section(self) -> Ids | Import:
        """The configuration's section of this source."""
        return self.run.config.vectors_by_name[self.part]

    def settings(self) -> dict[str, Any]:
        """See `Stage`: a recipe and the seed, or how an import makes its user vectors."""
        chosen, seed = self._chosen, self.run.config.run.seed
        if isinstance(chosen, Recipe):
            section = cast(Ids, self.section)  # sources beside `id` are imported
            holdout, model = section.held_out, section.model
            return {"seed": seed, "holdout": holdout, "users": {"kind": model, **chosen.model_dump(mode="json")}}
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
        files = [] if isinstance(chosen, Recipe) else [getattr(chosen, field) for field in IMPORTED_FILES]
        return [name, files]

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        from rarec.ids.make import write_source

        run, dataset = self.run, self.run.dataset
        identity = sha256_json([self.settings(), dataset.hash])
        progress = directory / PROGRESS
        figures = write_source(
            self.part, self.section, dataset, directory, run.config.run.seed, progress, identity, run.say
        )
        return Built({"name": self.part, **figures})

    @property
    def _chosen(self) -> Recipe | Import:
        section = self.section
        return section.chosen if isinstance(section, Ids) else section
