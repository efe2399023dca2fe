"""One evaluation: every variant, fusion and sanity check ranks the full catalogue for the same test users."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.config import RunConfig
from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import World
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
from rarec.neighbours.ranker import NeighbourRanker
from rarec.ranking import CachedRanker, EvalBatch, Ranker, VectorRanker, rank_users
from rarec.storage.files import write_json

Ranks = dict[str, npt.NDArray[np.int64]]

USERS_SEED = 17
"""Draws `evaluate.users`, whatever `run.seed` is: figures of several seeds are averaged user by user."""


class Bootstrap(TypedDict):
    """How intervals are drawn."""

    resamples: int
    seed: int


class Evaluator:
    """Ranks the same test users with every variant, one after the other.

    Args:
        config: configuration of the run.
        dataset: prepared dataset.
        ids: ranker of the ID model that variants are compared and fused with.
        neighbours: rankers of the neighbour models, by name.
        world: processes that share the work.
        say: prints one line to the user.

    Attributes:
        ranks: of the test targets, for every row that was ranked, in the order of the tables.
        diagnostics: of the main variant's alignment; None where that has no slots.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: PreparedDataset,
        ids: Ranker,
        neighbours: dict[str, NeighbourRanker],
        world: World,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.dataset, self.neighbours, self.world, self.say = config, dataset, neighbours, world, say
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
        self.external = external_ranks(config.evaluate.external, users, say=say)  # before hours of ranking
        self.ids: Ranker = CachedRanker(ids)
        self.cheap: dict[str, Ranker] = {**neighbours, "popularity": VectorRanker.of_counts(dataset.train_counts_N)}
        self.ranks: Ranks = {}
        self.validation_ranks: Ranks = {}
        self.fusions: dict[str, dict[str, Any]] = {}
        self.diagnostics: dict[str, Any] | None = None
        self._flat: set[str] = set()
        self._examples = Examples.drawn(self.test, config.report.examples, self.seed)
        self._best: dict[str, npt.NDArray[np.int64]] = {ID_ONLY: self._examples.best(self.ids)}

    def rank_untrained(self) -> None:
        """Rank by the ID model and, with late fusion, by the untrained baselines and their fusions."""
        rankers: dict[str, Ranker] = {ID_ONLY: self.ids}
        if self.config.evaluate.fusion:
            rankers |= self.cheap | self._fused(ALL_CHEAP, self.cheap)
            rankers |= self._fused(ID_ONLY + CHEAP, {**self.cheap, "id": self.ids})
        self._rank_both(rankers)

    def rank_variant(self, name: str, ranker_of: Callable[[bool], Ranker]) -> None:
        """Rank by a trained variant, alone and in fusions; the main one also in sanity checks.

        Args:
            name: of the variant.
            ranker_of: returns its ranker, given whether the vectors of its sources are permuted.
        """
        evaluate, ranker = self.config.evaluate, CachedRanker(ranker_of(False))
        if name in ("text_only", self.main):
            self._best[name] = self._examples.best(ranker)
        rankers: dict[str, Ranker] = {name: ranker}
        parts: dict[str, Ranker] = {name: ranker, "id": self.ids}
        if evaluate.fusion:
            rankers |= self._fused(name + FUSED, parts)
            rankers |= self._fused(name + FUSED + CHEAP, {**parts, **self.cheap})
        self._rank_both(rankers)
        if name == self.main and evaluate.fusion:
            self._rank(self.test, self._without_one(name + FUSED + CHEAP, {**parts, **self.cheap}))
        if name == self.main and evaluate.sanity_checks:
            shuffled = EvalBatch.of(self.dataset, self.targets, self.seed)
            self._rank(shuffled, {f"{name}/shuffled_history": ranker})
            self._rank(self.test, {f"{name}/permuted_ids": ranker_of(True)})

    def write(self, directory: Path) -> None:
        """Write the files of the evaluation, with the bound of a choice user by user, and ranks from outside."""
        if {self.main, ID_ONLY + CHEAP} <= set(self.ranks):
            self.ranks[self.main + ORACLE] = np.minimum(self.ranks[self.main], self.ranks[ID_ONLY + CHEAP])
        self.ranks |= self.external
        self._write_ranks(directory / "ranks.parquet")
        cutoffs, main = self.config.evaluate.cutoffs, self.main
        pairs = pairs_of_interest(self.ranks, main)
        tables: dict[str, Any] = {
            "metrics.json": metric_rows(self.ranks, cutoffs, **self._bootstrap),
            "validation.json": metric_rows(self.validation_ranks, cutoffs, **self._bootstrap),
            "comparisons.json": comparison_rows(self.ranks, pairs, cutoffs, **self._bootstrap),
            "strata.json": self._strata(),
            "fusion.json": self.fusions,
            "examples.json": self._examples.table(self.dataset, self._best, self.ranks),
            "diagnostics.json": self.diagnostics,
        }
        for name, table in tables.items():
            if table is not None:
                write_json(directory / name, table)

    def _strata(self) -> list[dict[str, Any]]:
        """Return the rows of strata.json, without the sanity checks."""
        lengths = self.targets.positions  # a target's position is the length of the history before it
        popularity = self.dataset.train_counts_N[self.test.targets]
        strata: dict[str, npt.NDArray[Any]] = {"history length": lengths, "popularity": popularity}
        if (popularity == 0).any():
            strata["met in training"] = (popularity > 0).astype(np.int64)
        if self.neighbours:
            listed = [ranker.lists_targets(self.test) for ranker in self.neighbours.values()]
            strata["neighbour models that list the target"] = np.sum(listed, axis=0)
        plain = {name: value for name, value in self.ranks.items() if "/" not in name}
        return strata_rows(plain, strata, slots_and_rival(plain, self.main), **self._bootstrap)

    @property
    def _bootstrap(self) -> Bootstrap:
        return {"resamples": self.config.evaluate.resamples, "seed": self.seed}

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
            self.say(f"{part_title(name)}: every item has the same score, so it adds nothing to a fusion")
        self._flat.update(fusion.flat)
        self.fusions[row] = fusion.as_json()
        return {row: fusion.ranker}

    def _rank_both(self, rankers: dict[str, Ranker]) -> None:
        """Rank validation and test users by rows that can be deployed."""
        self.validation_ranks |= rank_users(self.validation, rankers, self.world)
        self._rank(self.test, rankers)

    def _rank(self, batch: EvalBatch, rankers: dict[str, Ranker]) -> None:
        self.ranks |= rank_users(batch, rankers, self.world)
        for name in rankers:
            self.say(f"{name}: HR@10 {(self.ranks[name] <= 10).mean():.4f}, n = {len(self.ranks[name])}")

    def _write_ranks(self, path: Path) -> None:
        """Write a row for each test user and variant: ids of user and target, rank. Each variant is a row group."""
        test, dataset = self.test, self.dataset
        users, targets = dataset.user_ids.take(test.user_rows), dataset.item_ids.take(test.targets)
        columns = {"variant": pa.string(), "user": users.type, "target": targets.type, "rank": pa.int64()}
        with pq.ParquetWriter(path, pa.schema(columns)) as writer:
            for variant, values in self.ranks.items():
                variants = pa.repeat(pa.scalar(variant), len(values))
                writer.write_table(pa.table([variants, users, targets, pa.array(values)], schema=pa.schema(columns)))
