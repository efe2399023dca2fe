"""`rarec evaluate`, `accelerate launch launch/evaluate.py`: rank the full catalogue; only here is the test set read."""

import time
from pathlib import Path
from typing import Any

from rarec.errors import UserError
from rarec.stages.stage import Built, Stage
from rarec.storage.files import sha256_file, write_json


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
        baseline, _ = run.config.baseline
        counted = {f"neighbours/{name}": run.stage("neighbours", name) for name in run.config.neighbours.models}
        return {**trained, **counted, "prepare": run.stage("prepare"), "baseline": run.stage("ids", baseline)}

    def outside_inputs(self) -> dict[str, str]:
        """See `Stage`: hashes of outside ranks. The shards must be of the language model and prompt as they are now."""
        self.run.stage("shards").require(outside=True)
        return {f"external/{name}": _sha256(path) for name, path in self.run.config.evaluate.external.items()}

    def build(self, directory: Path) -> Built:
        """See `Stage`. Ranks share the work, and rank 0 writes."""
        from rarec.stages.evaluator import Evaluator, write_ranks

        started = time.monotonic()
        evaluation = Evaluator(self.run)
        ranks = evaluation.ranks()

        def write() -> None:
            write_ranks(directory / "ranks.parquet", self.run, evaluation.test, ranks)
            write_json(directory / "metrics.json", evaluation.metrics(ranks))
            write_json(directory / "validation.json", evaluation.validation_metrics())
            write_json(directory / "comparisons.json", evaluation.comparisons(ranks))
            write_json(directory / "strata.json", evaluation.strata(ranks))
            write_json(directory / "fusion.json", evaluation.fusions)
            write_json(directory / "examples.json", evaluation.examples(ranks))
            if evaluation.diagnostics is not None:
                write_json(directory / "diagnostics.json", evaluation.diagnostics)

        self.run.world.report("writing the evaluation")
        self.run.world.run_on_main(write)
        seconds = time.monotonic() - started
        return Built({"n": len(evaluation.test.targets), "seconds": seconds})


def _sha256(path: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"field `evaluate.external`: {path} does not exist", "correct the path, or leave it out")
    return sha256_file(Path(path))
