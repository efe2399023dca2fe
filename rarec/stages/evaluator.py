"""One evaluation: every variant, fusion and sanity check ranks the full catalogue for the same test users."""

from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.evaluation.diagnostics import variant_diagnostics
from rarec.evaluation.external import TargetUsers, external_ranks
from rarec.evaluation.fusion import fuse
from rarec.evaluation.labels import ALL_CHEAP, CHEAP, FUSED, ID_ONLY, ORACLE, WITHOUT, part_title
from rarec.evaluation.rows import (
    Examples,
    comparison_rows,
    metric_rows,
    pairs_of_interest,
    slots_and_rival,
    strata_rows,
)
from rarec.models.encode import Encoder
from rarec.models.towers import RaRec
from rarec.ranking import CachedRanker, EvalBatch, Ranker, VectorRanker, rank_users
from rarec.stages.run import Run
from rarec.stages.train import TrainStage

Ranks = dict[str, npt.NDArray[np.int64]]

USERS_SEED = 17
"""Draws `evaluate.users`, whatever `run.seed` is: figures of several seeds are averaged user by user."""


class Bootstrap(TypedDict):
    """How intervals are drawn."""

    resamples: int
    seed: int


class Evaluator:
    """Ranks the same test users with every variant, one after the other."""

    def __init__(self, run: Run) -> None:
        self.run, config, dataset = run, run.config, run.dataset
        self.main, self.seed = config.main_variant.name, config.run.seed
        self.targets = dataset.targets("test", config.evaluate.users, USERS_SEED)
        self.test = EvalBatch.of(dataset, self.targets)
        validation = dataset.targets("validation", config.train.validation_users, self.seed)
        self.validation = EvalBatch.of(dataset, validation).keeping_chunks()
        users = TargetUsers(
            dataset.user_ids.take(self.test.user_rows),
            dataset.item_ids,
            self.test.targets,
            self.test.histories,
        )
        self.external = external_ranks(config.evaluate.external, users, say=run.say)  # before hours of ranking
        self.ids: Ranker = CachedRanker(run.baseline.ranker())
        popularity = VectorRanker.of_counts(dataset.train_counts_N)
        self.cheap: dict[str, Ranker] = {**run.neighbours, "popularity": popularity}
        self.fusions: dict[str, dict[str, Any]] = {}
        self._flat: set[str] = set()
        self.validation_ranks: Ranks = {}
        self.diagnostics: dict[str, Any] | None = None
        self._examples = Examples.drawn(self.test, config.report.examples, self.seed)
        self._best: dict[str, npt.NDArray[np.int64]] = {ID_ONLY: self._examples.best(self.ids)}

    def ranks(self) -> Ranks:
        """Rank the test targets by every row: ID model, trained variants, fusions, bounds, sanity checks, outside."""
        rankers: dict[str, Ranker] = {ID_ONLY: self.ids}
        if self.run.config.evaluate.fusion:
            rankers |= self.cheap | self._fused(ALL_CHEAP, self.cheap)
            rankers |= self._fused(ID_ONLY + CHEAP, {**self.cheap, "id": self.ids})
        ranks = self._rank_both(rankers)
        for name in self.run.config.variants:  # one trained variant is loaded at a time
            model = TrainStage(self.run, name).best_model()
            with self.run.engine.serving(model):
                ranks |= self._ranks_of(name, model)
                if name == self.main:
                    self.diagnostics = self._diagnose(name, model)
        if {self.main, ID_ONLY + CHEAP} <= set(ranks):
            ranks[self.main + ORACLE] = np.minimum(ranks[self.main], ranks[ID_ONLY + CHEAP])
        return ranks | self.external

    def _diagnose(self, name: str, model: RaRec) -> dict[str, Any] | None:
        run = self.run
        inputs = (run.config, run.dataset, run.prompts, run.sources)
        return variant_diagnostics(model, name, *inputs, say=run.say, world=run.world)

    def examples(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Return the rows of examples.json."""
        return self._examples.table(self.run.dataset, self._best, ranks)

    def metrics(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Return the rows of metrics.json."""
        return metric_rows(ranks, self.run.config.evaluate.cutoffs, **self._bootstrap)

    def validation_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of validation.json: the metrics of every row that can be deployed, on validation users."""
        return metric_rows(self.validation_ranks, self.run.config.evaluate.cutoffs, **self._bootstrap)

    def comparisons(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Return the rows of comparisons.json."""
        pairs = pairs_of_interest(ranks, self.main)
        return comparison_rows(ranks, pairs, self.run.config.evaluate.cutoffs, **self._bootstrap)

    def strata(self, ranks: Ranks) -> list[dict[str, Any]]:
        """Return the rows of strata.json, without the sanity checks."""
        lengths = self.targets.positions  # a target's position is the length of the history before it
        popularity = self.run.dataset.train_counts_N[self.test.targets]
        strata: dict[str, npt.NDArray[Any]] = {"history length": lengths, "popularity": popularity}
        if (popularity == 0).any():
            strata["met in training"] = (popularity > 0).astype(np.int64)
        if self.run.neighbours:
            listed = [ranker.lists_targets(self.test) for ranker in self.run.neighbours.values()]
            strata["neighbour models that list the target"] = np.sum(listed, axis=0)
        plain = {name: value for name, value in ranks.items() if "/" not in name}
        return strata_rows(plain, strata, slots_and_rival(plain, self.main), **self._bootstrap)

    @property
    def _bootstrap(self) -> Bootstrap:
        return {"resamples": self.run.config.evaluate.resamples, "seed": self.seed}

    def _ranks_of(self, name: str, model: RaRec) -> Ranks:
        """Rank by a trained variant, alone and in fusions; the main one also with a part left out, and destroyed."""
        run, config = self.run, self.run.config
        ranker = CachedRanker(self._ranker_of(model))
        if name in ("text_only", self.main):
            self._best[name] = self._examples.best(ranker)
        rankers: dict[str, Ranker] = {name: ranker}
        if config.evaluate.fusion:
            parts: dict[str, Ranker] = {name: ranker, "id": self.ids}
            rankers |= self._fused(name + FUSED, parts)
            rankers |= self._fused(name + FUSED + CHEAP, {**parts, **self.cheap})
        ranks = self._rank_both(rankers)
        if name != self.main:
            return ranks
        if config.evaluate.fusion:
            ranks |= self._rank(self.test, self._without_one(name + FUSED + CHEAP, {**parts, **self.cheap}))
        if config.evaluate.sanity_checks:
            shuffled = EvalBatch.of(run.dataset, self.targets, self.seed)
            ranks |= self._rank(shuffled, {f"{name}/shuffled_history": ranker})
            ranks |= self._rank(self.test, {f"{name}/permuted_ids": self._ranker_of(model, permuted=True)})
        return ranks

    def _without_one(self, row: str, parts: dict[str, Ranker]) -> dict[str, Ranker]:
        """Return the fusions of all parts but one; without the first, the variant itself, it is a row of its own."""
        rankers: dict[str, Ranker] = {}
        for part in list(parts)[1:]:
            rest = {name: ranker for name, ranker in parts.items() if name != part}
            rankers |= self._fused(f"{row}{WITHOUT}{part}", rest)
        return rankers

    def _fused(self, row: str, parts: dict[str, Ranker]) -> dict[str, Ranker]:
        """Return the late fusion of some models, as the row of that name."""
        fusion = fuse(parts, self.validation)
        for name in sorted(set(fusion.flat) - self._flat):
            self.run.say(f"{part_title(name)}: every item has the same score, so it adds nothing to a fusion")
        self._flat.update(fusion.flat)
        self.fusions[row] = fusion.as_json()
        return {row: fusion.ranker}

    def _rank_both(self, rankers: dict[str, Ranker]) -> Ranks:
        """Return ranks of the test users by rows that can be deployed; those of the validation users are kept."""
        self.validation_ranks |= rank_users(self.validation, rankers, self.run.world)
        return self._rank(self.test, rankers)

    def _rank(self, batch: EvalBatch, rankers: dict[str, Ranker]) -> Ranks:
        ranks = rank_users(batch, rankers, self.run.world)
        for name in rankers:
            self.run.say(f"{name}: HR@10 {(ranks[name] <= 10).mean():.4f}, n = {len(ranks[name])}")
        return ranks

    def _ranker_of(self, model: RaRec, permuted: bool = False) -> Ranker:
        sources = self.run.sources
        if permuted:
            sources = {name: source.permuted(self.seed) for name, source in sources.items()}
        batch_size = self.run.config.evaluate.batch_size
        encoder = Encoder(model, self.run.prompts, sources, batch_size, self.run.world, self.run.scratch)
        return self.run.ranker(encoder.items(), encoder.users)


def write_ranks(path: Path, run: Run, test: EvalBatch, ranks: Ranks) -> None:
    """Write one row for each test user and variant: ids of user and target, rank. Each variant is a row group."""
    users, targets = run.dataset.user_ids.take(test.user_rows), run.dataset.item_ids.take(test.targets)
    columns = {"variant": pa.string(), "user": users.type, "target": targets.type, "rank": pa.int64()}
    with pq.ParquetWriter(path, pa.schema(columns)) as writer:
        for variant, values in ranks.items():
            variants = pa.repeat(pa.scalar(variant), len(values))
            writer.write_table(pa.table([variants, users, targets, pa.array(values)], schema=pa.schema(columns)))
