"""The stages of the results: `rarec evaluate`, and `rarec report`, one HTML file from what the run left.

Only the evaluation reads the test set.
"""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarec.config import dump_config
from rarec.errors import UserError
from rarec.report.run_files import RunDirectories
from rarec.stages.run import Run
from rarec.stages.stage import Built, Stage
from rarec.stages.train import TrainStage
from rarec.storage.artefacts import MANIFEST, check_files, read_manifest
from rarec.storage.files import sha256_file
from rarec.version import source

if TYPE_CHECKING:
    from rarec.models.towers import RaRec
    from rarec.ranking.rankers import Ranker


class EvaluateStage(Stage):
    """ranks.parquet, and as JSON metrics, validation, comparisons, strata, fusion, examples and diagnostics.

    The last is about the alignment of the main variant, and missing where that has no slots.
    """

    name = "evaluate"
    folder = "evaluation"
    summary = "Rank the full catalogue with every variant (as launch/evaluate.py does on several ranks)."

    def settings(self) -> dict[str, Any]:
        """See `Stage`."""
        config = self.run.config
        sections = config.sections("evaluate", "report", "neighbours")
        variants = {"variants": list(config.variants), "main": config.main_variant.name}
        return {"seed": config.run.seed, **sections, **variants}

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`."""
        run = self.run
        trained: dict[str, Stage] = {name: run.stage("train", name) for name in run.config.variants}
        counted = {f"neighbours/{name}": run.stage("neighbours", name) for name in run.config.neighbour_tables}
        return {**trained, **counted, "prepare": run.stage("prepare"), "baseline": run.stage("ids", "id")}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: hashes of outside ranks. The shards must be of the language model and prompt as they are now."""
        self.run.stage("shards").require(outside=True)
        return {f"external/{name}": _sha256(path) for name, path in self.run.config.evaluate.external.items()}

    def build(self, directory: Path) -> Built:
        """See `Stage`. Ranks share the work, and rank 0 writes."""
        from rarec.evaluation.diagnostics import variant_diagnostics
        from rarec.evaluation.evaluator import Evaluator

        run = self.run
        started = time.monotonic()
        evaluator = Evaluator(
            run.config, run.dataset, run.sources["id"].ranker(), run.neighbours, world=run.world, say=run.say
        )
        evaluator.rank_untrained()
        for name in run.config.variants:  # one trained variant is loaded at a time
            model = TrainStage(run, name).best_model()
            with run.engine.serving(model):
                evaluator.rank_variant(name, partial(self._ranker, model))
                if name == run.config.main_variant.name:
                    encoder = run.encoder(model)
                    evaluator.diagnostics = variant_diagnostics(encoder, name, run.config, run.dataset, run.say)
        run.world.report("writing the evaluation")
        run.world.run_on_main(lambda: evaluator.write(directory))
        return Built({"n": len(evaluator.test.targets), "seconds": time.monotonic() - started})

    def _ranker(self, model: "RaRec", permuted: bool) -> "Ranker":
        """Return a ranker by the vectors of a trained variant, on request with the vectors of sources permuted."""
        run = self.run
        seed = run.config.run.seed
        sources = {name: source.permuted(seed) if permuted else source for name, source in run.sources.items()}
        return run.encoder(model, sources).ranker()


def _sha256(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"field `evaluate.external`: {path} does not exist", "correct the path, or leave it out")
    return sha256_file(Path(path))


class ReportStage(Stage):
    """`report.html`: figures, intervals, a verdict in words, plots. It needs no other file and no network."""

    name = "report"
    summary = "Write one HTML file of all results."
    cheap = True

    def settings(self) -> dict[str, Any]:
        """See `Stage`: the whole configuration, which the report shows, and the version that writes it."""
        config = self.run.config
        return {"version": source()["version"], "main": config.main_variant.name, "config": dump_config(config)}

    def inputs(self) -> dict[str, Stage]:
        """See `Stage`: the evaluation, and the variants whose curves are shown."""
        return {"evaluate": self.run.stage("evaluate"), **{stage.part: stage for stage in self.run.stages("train")}}

    def build(self, directory: Path) -> Built:
        """See `Stage`."""
        self.run.world.run_on_main(lambda: self._write(directory))
        self.run.say(f"report: {self.directory / 'report.html'}")
        return Built()

    def _write(self, directory: Path) -> None:
        from rarec.report.html import write_report

        run = self.run
        run.stage("evaluate").checked()
        for stage, files in (("prepare", []), ("shards", ["selection.json"])):  # which may be elsewhere by now
            place = run.directory(stage)
            if (place / MANIFEST).exists():
                check_files(place, read_manifest(place, stage), names=files)
        write_report(directory, directories(run), run.config, say=run.say)


def directories(run: Run) -> RunDirectories:
    """Return where a run has the files that its report and the terminal show."""
    training = {stage.part: stage.directory for stage in run.stages("train")}
    return RunDirectories(run.directory("evaluate"), run.directory("prepare"), run.directory("shards"), training)
