"""`rarec export` and `rarec recommend`: the bundle that a user takes away, and its first use."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarec.artefacts import sha256_json
from rarec.config import MODEL_SECTIONS
from rarec.errors import UserError
from rarec.files import read_json
from rarec.stages.stage import Built, Stage
from rarec.stages.train import TrainStage

if TYPE_CHECKING:
    from rarec.serving.bundle import Provenance
    from rarec.stages.run import Run


class ExportStage(Stage):
    """The bundle of the variant `export.variant` at its best validation, with the evaluation's figures."""

    name = "export"
    kind = folder = "bundle"
    summary = "Write the bundle to take away."

    def settings(self) -> dict[str, Any]:
        """See `Stage`."""
        config = self.run.config
        return {
            "variant": config.main_variant.identity,
            "dtype": config.export.dtype,
            **config.sections(*MODEL_SECTIONS),
        }

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        run = self.run
        sources = {f"ids/{name}": run.stage("ids", name) for name in run.config.sources_by_name}
        others = {name: run.stage(name) for name in ("prepare", "evaluate")}
        return {**others, **sources, "train": self._trained}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: hashes of the language model, the prompt and the catalogue."""
        return {**self.run.model_inputs, "catalogue": catalogue_hash(self.run)}

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        from rarec.serving.bundle import write_bundle

        run, variant = self.run, self.run.config.main_variant
        evaluation = run.stage("evaluate")
        evaluation.check_files()
        rows = read_json(evaluation.directory / "metrics.json")
        metrics = [row for row in rows if row["variant"] == variant.name]
        count = self._trained.require()["trainable_parameters"]
        figures = write_bundle(
            directory, self._trained.best_model(), variant, run.config, provenance(run), metrics, count
        )
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        run.say(f"{self.directory}: {count:,} trained parameters, {size / 1e6:.1f} MB")
        return Built(figures)

    @cached_property
    def _trained(self) -> TrainStage:
        return TrainStage(self.run, self.run.config.main_variant.name)


def catalogue_hash(run: "Run") -> str:
    """Return the hash of all items' ids, titles and texts."""
    dataset = run.dataset
    return sha256_json([[str(i) for i in dataset.item_ids.to_pylist()], dataset.titles, dataset.texts])


def provenance(run: "Run") -> "Provenance":
    """Return what a bundle's model belongs to in this run: hashes by name, the language model, sources' shapes."""
    from rarec.serving.bundle import Provenance

    sources = {f"ids/{name}": source.hash for name, source in run.sources.items()}
    hashes = {"prepare": run.dataset.hash, **sources, **run.model_inputs, "catalogue": catalogue_hash(run)}
    return Provenance(hashes, run.llm.identity, run.shapes)


def recommend(run: "Run", user: str, k: int, bundle: Path | None = None) -> list[tuple[str, str]]:
    """Return the k best new items for a user of the prepared dataset, as (item id, title).

    Raises:
        UserError: the user is not in the dataset, or the bundle does not belong to this run's data and model.
    """
    import numpy as np

    from rarec.models.encode import Encoder
    from rarec.ranking import EvalBatch, VectorRanker
    from rarec.serving.bundle import load_bundle

    dataset = run.dataset
    names = [str(value) for value in dataset.user_ids.to_pylist()]
    if user not in names:
        raise UserError(f"user {user!r} is not in {dataset.directory}", f"ids look like {names[0]!r}")
    directory = bundle or run.directory("export")
    model = load_bundle(directory, run.config, run.load_llm, provenance(run), run.prompts.sources)
    row = names.index(user)
    sequence = dataset.sequence(row)
    batch = EvalBatch(np.array([row]), [sequence], sequence[-1:])
    with run.engine.serving(model):
        encoder = Encoder(model, run.prompts, run.sources, run.config.evaluate.batch_size, run.world)
        best = [int(item) for item in VectorRanker(encoder.items(), encoder.users).top_k(batch, k)[0] if item >= 0]
    return [(str(dataset.item_ids[item]), dataset.titles[item]) for item in best]
