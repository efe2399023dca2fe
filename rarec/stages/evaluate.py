"""`accelerate launch launch/evaluate.py`: rank the whole catalogue with every variant; only here is the test set read."""

import time
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.artefacts import write_manifest
from rarec.config import VARIANTS
from rarec.config.identity import evaluate_settings
from rarec.evaluation.examples import Examples
from rarec.evaluation.figures import comparison_rows, metric_rows, pairs_of_interest
from rarec.evaluation.fusion import fuse
from rarec.evaluation.labels import FUSED, ID_ONLY, POPULAR
from rarec.evaluation.strata import strata_rows
from rarec.files import new_directory, write_json
from rarec.models.encode import Encoder
from rarec.models.towers import RaRec
from rarec.ranking import EvalBatch, Ranker, rank_users
from rarec.stages.context import Context
from rarec.stages.diagnose import diagnostics
from rarec.stages.shards import finished_shards
from rarec.stages.trained import best_model, variant_hash

Ranks = dict[str, npt.NDArray[np.int64]]

USERS_SEED = 17
"""Draws `evaluate.users`, whatever `run.seed`: several seeds are averaged user by user."""


class Bootstrap(TypedDict):
    """How intervals are drawn."""

    resamples: int
    seed: int


def evaluate(context: Context) -> None:
    """Make `evaluation/`: ranks.parquet, metrics.json, comparisons.json, strata.json, examples.json, diagnostics.json.

    The last is about the main variant's alignment, and is not there where that has no slots.
    """
    finished_shards(context)
    _ = context.main  # refused if it is not trained
    made_from: dict[str, str] = {name: variant_hash(context, VARIANTS[name]) for name in context.config.train.variants}
    made_from |= {"prepare": context.dataset.hash, "baseline": context.baseline.hash}
    settings = evaluate_settings(context.config)
    with context.alone(context.paths.evaluation):
        if not context.is_done(context.paths.evaluation, "evaluate", settings, made_from):
            _evaluate(context, settings, made_from)


def _evaluate(context: Context, settings: dict[str, Any], made_from: dict[str, str]) -> None:
    started = time.monotonic()
    evaluation = _Evaluation(context)
    ranks = evaluation.ranks()

    def write() -> None:
        with new_directory(context.paths.evaluation) as aside:
            _write_ranks(aside / "ranks.parquet", context, evaluation.test, ranks)
            write_json(aside / "metrics.json", evaluation.metrics(ranks))
            write_json(aside / "comparisons.json", evaluation.comparisons(ranks))
            write_json(aside / "strata.json", evaluation.strata(ranks))
            write_json(aside / "examples.json", evaluation.examples(ranks))
            if evaluation.diagnostics is not None:
                write_json(aside / "diagnostics.json", evaluation.diagnostics)
            figures: dict[str, Any] = {
                "n": len(evaluation.test.targets),
                "seconds": time.monotonic() - started,
                "fusion": evaluation.weights,
            }
            write_manifest(aside, "evaluate", settings=settings, made_from=made_from, **figures)

    context.world.report("writing the evaluation")
    context.world.run_on_main(write)


class _Evaluation:
    """The variants in order, each ranked on the same test users."""

    def __init__(self, context: Context) -> None:
        self.context, config, dataset = context, context.config, context.dataset
        self.main, self.seed = config.export.variant, config.run.seed
        self.targets = dataset.targets("test", config.evaluate.users, USERS_SEED)
        self.test = EvalBatch.of(dataset, self.targets)
        validation = dataset.targets("validation", config.train.validation_users, self.seed)
        self.validation = EvalBatch.of(dataset, validation)
        self.ids = context.baseline.ranker()
        self.weights: dict[str, float] = {}
        self.diagnostics: dict[str, Any] | None = None
        self._examples = Examples.drawn(self.test, config.report.examples, self.seed)
        self._best: dict[str, npt.NDArray[np.int64]] = {ID_ONLY: self._examples.best(self.ids)}

    def ranks(self) -> Ranks:
        """Ranks of the test targets by variant: the ID model, the trained variants, their fusions, the sanity checks."""
        popular = self._with_popularity(ID_ONLY, self.ids) if self.context.config.evaluate.fusion else {}
        ranks = self._rank(self.test, {ID_ONLY: self.ids, **popular})
        for name in self.context.config.train.variants:  # one trained variant is loaded at a time
            model = best_model(self.context, VARIANTS[name])
            with self.context.engine.serving(model):
                ranks |= self._ranks_of(name, model)
                if name == self.main:
                    self.diagnostics = diagnostics(self.context, model)
        return ranks

    def examples(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Rows of examples.json."""
        return self._examples.table(self.context.dataset, self._best, ranks)

    def metrics(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Rows of metrics.json."""
        return metric_rows(ranks, self.context.config.evaluate.cutoffs, **self._bootstrap)

    def comparisons(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Rows of comparisons.json."""
        pairs = pairs_of_interest(ranks, self.main)
        return comparison_rows(ranks, pairs, self.context.config.evaluate.cutoffs, **self._bootstrap)

    def strata(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Rows of strata.json, without the sanity checks."""
        lengths = self.targets.positions  # a target's position is the length of what stands before it
        popularity = self.context.dataset.train_counts_N[self.test.targets]
        strata: dict[str, npt.NDArray[Any]] = {"history length": lengths, "popularity": popularity}
        if (popularity == 0).any():
            strata["met in training"] = (popularity > 0).astype(np.int64)
        plain = {name: value for name, value in ranks.items() if "/" not in name}
        return strata_rows(plain, strata, **self._bootstrap)

    @property
    def _bootstrap(self) -> Bootstrap:
        return {"resamples": self.context.config.evaluate.resamples, "seed": self.seed}

    def _ranks_of(self, name: str, model: RaRec) -> Ranks:
        """One trained variant, its fusion, and the sanity checks of the main one."""
        config, context = self.context.config, self.context
        ranker = self._of(model)
        if name in ("text_only", self.main):
            self._best[name] = self._examples.best(ranker)
        rankers: dict[str, Ranker] = {name: ranker}
        if config.evaluate.fusion:
            fused, self.weights[name] = fuse(ranker, self.ids, self.validation)
            rankers[name + FUSED] = fused
            if name in ("text_only", self.main):
                rankers |= self._with_popularity(name + FUSED, fused)
        ranks = self._rank(self.test, rankers)
        if name == self.main and config.evaluate.sanity_checks:
            shuffled = EvalBatch.of(context.dataset, self.targets, self.seed)
            ranks |= self._rank(shuffled, {f"{name}/shuffled_history": ranker})
            ranks |= self._rank(self.test, {f"{name}/permuted_ids": self._of(model, permuted=True)})
        return ranks

    def _with_popularity(self, name: str, ranker: Ranker) -> dict[str, Ranker]:
        """The cheapest baseline of all that slots may bring: how often items were met, added to the score."""
        popularity = Ranker.of_counts(self.context.dataset.train_counts_N)
        fused, self.weights[name + POPULAR] = fuse(popularity, ranker, self.validation)
        return {name + POPULAR: fused}

    def _rank(self, batch: EvalBatch, rankers: dict[str, Ranker]) -> Ranks:
        ranks = rank_users(batch, rankers, self.context.world)
        for name in rankers:
            self.context.say(f"{name}: HR@10 {(ranks[name] <= 10).mean():.4f}, n = {len(ranks[name])}")
        return ranks

    def _of(self, model: RaRec, permuted: bool = False) -> Ranker:
        sources = self.context.sources
        if permuted:
            sources = {name: source.permuted(self.seed) for name, source in sources.items()}
        batch_size = self.context.config.evaluate.batch_size
        encoder = Encoder(model, self.context.prompts, sources, batch_size, self.context.world)
        return Ranker(encoder.items(), encoder.users).cached()


def _write_ranks(path: Path, context: Context, test: EvalBatch, ranks: Ranks) -> None:
    """One row a test user and variant: variant, user and target by their own ids, rank. A variant is a row group."""
    users = context.dataset.user_ids.take(pa.array(test.user_rows))
    targets = context.dataset.item_ids.take(pa.array(test.targets))
    columns = {"variant": pa.string(), "user": users.type, "target": targets.type, "rank": pa.int64()}
    with pq.ParquetWriter(path, pa.schema(columns)) as writer:
        for variant, values in ranks.items():
            variants = pa.repeat(pa.scalar(variant), len(values))
            writer.write_table(pa.table([variants, users, targets, pa.array(values)], schema=pa.schema(columns)))
