"""`rarec export`: the bundle that a user takes away."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarec.config import MODEL_SECTIONS
from rarec.config.method import NO_VARIANTS
from rarec.errors import UserError
from rarec.evaluation.results import ID_ONLY, LEARNED, Results, figure, variant_title
from rarec.evaluation.verdict import BestVariant, verdict
from rarec.stages.stage import Built, Stage
from rarec.stages.train import TrainStage
from rarec.storage.files import read_json

if TYPE_CHECKING:
    from rarec.bundle.write import Contents, Trained
    from rarec.ids.source import Source

READ = ("metrics.json", "comparisons.json", "validation.json", "fusion.json")
"""Files of the evaluation that are read."""


class ExportStage(Stage):
    """The bundle of one row of the results: by default the one that is best on validation users.

    A further bundle of a run is a part, named by the absolute path of its folder.
    """

    name = "export"
    kind = folder = "bundle"
    remembers = False  # a bundle is copied and taken away
    summary = "Write the bundle to take away: a whole recommender, but for the language model."

    @property
    def directory(self) -> Path:
        """See `Stage`."""
        return Path(self.part) if self.part else super().directory

    def settings(self) -> dict[str, Any]:
        """See `Stage`."""
        config = self.run.config
        row = config.export.variant
        known = (*config.variants, *NO_VARIANTS, *config.neighbours.by_name)
        if row is not None and row.partition("+")[0] not in known:
            problem = f"field `export.variant`: {row} is of no variant of train.variants ({', '.join(config.variants)})"
            raise UserError(problem, "add it to train.variants, or leave export.variant out: the best row is exported")
        of_export = config.export.model_dump(mode="json", exclude={"variant"})
        items = config.prepare.items
        kept = {"columns": items.kept, "date": items.date} if items.kept else {}
        return {"row": row, **of_export, **kept, **config.sections(*MODEL_SECTIONS)}

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        run = self.run
        evaluation = run.stage("evaluate")
        sources = {f"ids/{name}": run.stage("ids", name) for name in run.config.sources_by_name}
        return {**evaluation.inputs(), **sources, "evaluate": evaluation}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: hashes of the language model and the prompt, and of the catalogue if its columns are kept."""
        from rarec.data.preparation.inputs import input_hashes

        prepare = self.run.config.prepare
        columns = {"items": input_hashes(prepare)["items"]} if prepare.items.kept else {}
        return {**self.run.model_inputs, **columns}

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        from rarec.bundle.bundle import LLM
        from rarec.bundle.write import write_bundle, write_card
        from rarec.models.model_folder import copy_model

        run = self.run
        evaluation = run.stage("evaluate").checked(*READ)
        metrics, comparisons, validation, fusion = (read_json(evaluation / name) for name in READ)
        judged = verdict(Results(metrics, comparisons, validation), run.config.main_variant.name, run.config.run.seed)
        row, why = self._row(judged.best, {metric["variant"] for metric in validation})
        contents = self._contents(row, fusion)
        run.world.run_on_main(lambda: write_bundle(directory, contents, run.config))
        if run.config.export.with_llm and contents.trained:
            run.world.run_on_main(lambda: copy_model(run.config.llm, run.converted_llm, directory / LLM))
        trained = contents.trained and run.stage("train", contents.trained.variant.name).require()
        figures = {
            "row": row,
            "why": why,
            "metrics": [figure for figure in metrics if "/" not in figure["variant"]],
            "trained_parameters": trained["trainable_parameters"] if trained else 0,
        }
        run.world.run_on_main(lambda: write_card(directory, contents, run.config, figures, judged.headline))
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        run.say(f"{self.directory}: {why}, {size / 1e6:.1f} MB")
        return Built(figures)

    def _row(self, best: BestVariant | None, rows: Set[str]) -> tuple[str, str]:
        """Return the row to export, and why this one."""
        wanted = self.run.config.export.variant
        if wanted is not None and wanted not in rows:
            problem = f"field `export.variant`: {wanted} is not in the results"
            raise UserError(problem, f"choose from {', '.join(sorted(rows))}")
        if best is None or wanted is not None:
            row = wanted or self.run.config.main_variant.name
            return row, f"{variant_title(row)}, as export.variant says"
        value = f"{best.metric.upper()} {figure(best.chosen)}"
        return best.name, f"{best.title}, the best on validation users ({value})"

    def _contents(self, row: str, fusions: Mapping[str, Mapping[str, Mapping[str, float]]]) -> "Contents":
        import numpy as np
        from safetensors.numpy import load_file

        from rarec.bundle.items import columns_of
        from rarec.bundle.recommended import Catalogue
        from rarec.bundle.write import Contents
        from rarec.evaluation.evaluator import ORDERS
        from rarec.neighbours.base import VECTORS

        run = self.run
        items = run.dataset
        parts = fusions.get(row) or {"id" if row == ID_ONLY else row: {"weight": 1.0, "new_weight": 1.0}}
        trained = next((self._trained(name) for name in parts if name in run.config.variants), None)
        sources = dict(run.sources) if trained else {}
        if "id" in parts:
            sources["id"] = run.sources["id"]
        for name, source in sources.items():
            _check_servable(name, source)
        tables = {name: run.directory("neighbours", name) for name in run.config.neighbours.by_name if name in parts}
        ids = items.item_ids.whole()
        columns = columns_of(run.config.prepare, ids)
        catalogue = Catalogue(ids, list(items.titles), list(items.texts), items.train_counts_N, columns)
        read = next((folder / VECTORS for folder in tables.values() if (folder / VECTORS).exists()), None)
        texts_ND = np.load(read, allow_pickle=False) if trained and read else None
        known = load_file(run.directory("evaluate") / ORDERS) if row.endswith(LEARNED) else {}
        order = {name.rpartition("/")[2]: array for name, array in known.items() if name.rpartition("/")[0] == row}
        return Contents(row, parts, catalogue, trained, sources, tables, texts_ND, order if known else None)

    def _trained(self, name: str) -> "Trained":
        """Return a trained variant with its vectors of the catalogue, which all ranks compute."""
        from rarec.bundle.write import Trained

        run = self.run
        model = TrainStage(run, name).best_model()
        with run.engine.serving(model):
            items_NZ = run.encoder(model).items()
        return Trained(model, run.config.variant(name), items_NZ, run.llm.identity)


def _check_servable(name: str, source: "Source") -> None:
    """Refuse user vectors that know only the users of the log."""
    if source.manifest["settings"]["users"]["kind"] == "table":
        problem = f"the user vectors of `{name}` are a table of the log's users, and a bundle serves any history"
        raise UserError(problem, "leave out the table, so that `user_rule` makes them, or export a row without them")
