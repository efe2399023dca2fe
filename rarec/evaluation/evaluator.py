"""One evaluation: every variant, fusion and sanity check ranks the full catalogue for the same test users."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from rarec.config import RunConfig
from rarec.config.neighbours import REFIT
from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import World
from rarec.evaluation.external import external_ranks
from rarec.evaluation.fusion import fuse
from rarec.evaluation.learned import FEWEST, examples_of, learn
from rarec.evaluation.lists import ListMetrics
from rarec.evaluation.results import (
    ALL_CHEAP,
    CHEAP,
    FUSED,
    ID_ONLY,
    LEARNED,
    LISTED,
    ORACLE,
    POPULARITY,
    REFITTED,
    WITHOUT,
    part_title,
)
from rarec.evaluation.rows import comparison_rows, metric_rows, pairs_of_interest, slots_and_rival, strata_rows
from rarec.ranking.learned import LearnedRanker
from rarec.ranking.order import CANDIDATES
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import CachedRanker, FusedRanker, NeighbourRanker, Ranker, VectorRanker, rank_users
from rarec.storage.files import write_json

Ranks = dict[str, npt.NDArray[np.int64]]
ORDERS = "orders.safetensors"
"""File: the weights of learned orders, as `ROW/WEIGHT`."""
USERS_SEED = 17
"""Draws `evaluate.users`, whatever `run.seed` is: figures of several seeds are averaged user by user."""
SHOWN_HISTORY, TOP = 10, 10
"""Titles of an example: of the history, and of each variant's list."""


class Evaluator:
    """Ranks the same test users with every variant, one after the other.

    Args:
        config: configuration of the run.
        dataset: prepared dataset.
        ids: ranker of the ID model that variants are compared and fused with.
        neighbours: rankers of the neighbour tables, by name (`RunConfig.neighbour_tables`).
        world: processes that share the work.
        say: prints one line to the user.

    Attributes:
        ranks: of the test targets, for every row that was ranked, in the order of the tables.
        orders: weights of learned orders, as `ROW/WEIGHT`.
        diagnostics: of the main variant's alignment; None where that has no slots.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: PreparedDataset,
        ids: VectorRanker,
        neighbours: dict[str, NeighbourRanker],
        world: World,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.dataset, self.world, self.say = config, dataset, world, say
        self.neighbours = {name: ranker for name, ranker in neighbours.items() if not name.endswith(REFIT)}
        self.main, self.seed = config.main_variant.name, config.run.seed
        self.test = self._asked("test", config.evaluate.users, USERS_SEED)
        self.validation = self._asked("validation", config.train.validation_users, self.seed).keeping_chunks()
        self.external = external_ranks(config.evaluate.external, dataset, self.test, say)  # before hours of ranking
        self.ids: Ranker = CachedRanker(ids)
        self.cheap: dict[str, Ranker] = {**self.neighbours, POPULARITY: VectorRanker.of_counts(dataset.train_counts_N)}
        self.refitted: dict[str, Ranker] = {}
        if config.evaluate.refit:
            again = {name.removesuffix(REFIT): table for name, table in neighbours.items() if name.endswith(REFIT)}
            self.refitted = {**again, POPULARITY: VectorRanker.of_counts(dataset.refitted().train_counts_N)}
        self.lists = ListMetrics(dataset, ids.items_NZ)
        self.ranks: Ranks = {}
        self.validation_ranks: Ranks = {}
        self.fusions: dict[str, dict[str, Any]] = {}
        self.orders: dict[str, npt.NDArray[Any]] = {}
        self.diagnostics: dict[str, Any] | None = None
        self._flat: set[str] = set()
        total = len(self.test.targets)
        rows = np.random.default_rng(self.seed).choice(total, min(config.report.examples, total), replace=False)
        self._example_rows = np.sort(rows)  # drawn at random, so that nobody picks flattering ones
        self._best: Ranks = {}
        self._bootstrap = {"resamples": config.evaluate.resamples, "seed": self.seed}

    def _asked(
        self, part: Literal["validation", "test"], users: int | None, seed: int, shuffled_by: int | None = None
    ) -> EvalBatch:
        """Return the questions of some users, as the section `evaluate` asks them."""
        asked = self.config.evaluate
        targets = self.dataset.targets(part, users, seed, every=asked.targets == "all")
        newest, exclude = asked.max_history, asked.exclude_seen
        return EvalBatch.of(self.dataset, targets, newest=newest, exclude_seen=exclude, shuffled_by=shuffled_by)

    def rank_untrained(self) -> None:
        """Rank by the ID model and, with late fusion, by the untrained baselines and their fusions."""
        self._keep_best(ID_ONLY, self.ids)
        rankers: dict[str, Ranker] = {ID_ONLY: self.ids}
        if self.config.evaluate.fusion:
            rankers |= self.cheap | self._fused(ALL_CHEAP, self.cheap)
            rankers |= self._fused(ID_ONLY + CHEAP, {**self.cheap, "id": self.ids})
        self._rank_both(rankers, ID_ONLY + CHEAP)

    def rank_variant(self, name: str, ranker_of: Callable[[bool], Ranker]) -> None:
        """Rank by a trained variant, alone and in fusions; the main one also in sanity checks.

        Args:
            name: of the variant.
            ranker_of: returns its ranker, given whether the vectors of its sources are permuted.
        """
        evaluate = self.config.evaluate
        ranker = CachedRanker(ranker_of(False))
        if name in ("text_only", self.main):
            self._keep_best(name, ranker)
        rankers: dict[str, Ranker] = {name: ranker}
        parts: dict[str, Ranker] = {name: ranker, "id": self.ids, **self.cheap}
        if evaluate.fusion:
            rankers |= self._fused(name + FUSED, {name: ranker, "id": self.ids})
            rankers |= self._fused(name + FUSED + CHEAP, parts)
        self._rank_both(rankers, name + FUSED + CHEAP)
        if name == self.main and evaluate.fusion:
            self._rank(self.test, self._without_one(name + FUSED + CHEAP, parts))
        if name == self.main and evaluate.sanity_checks:
            shuffled = self._asked("test", evaluate.users, USERS_SEED, self.seed)
            self._rank(shuffled, {f"{name}/shuffled_history": ranker})
            self._rank(self.test, {f"{name}/permuted_ids": ranker_of(True)})

    def write(self, directory: Path) -> None:
        """Write the files of the evaluation, with the bound of a choice user by user, and ranks from outside."""
        if {self.main, ID_ONLY + CHEAP} <= set(self.ranks):
            self.ranks[self.main + ORACLE] = np.minimum(self.ranks[self.main], self.ranks[ID_ONLY + CHEAP])
        self.ranks |= self.external
        self._write_ranks(directory / "ranks.parquet")
        if self.orders:
            save_file(self.orders, directory / ORDERS)
        cutoffs, main = self.config.evaluate.cutoffs, self.main
        tested: dict[str, Any] = {**self._bootstrap, "users": self.test.user_rows}
        validated: dict[str, Any] = {**self._bootstrap, "users": self.validation.user_rows}
        pairs = pairs_of_interest(self.ranks, main)
        examples = [self._example(number, row) for number, row in enumerate(self._example_rows)]
        tables: dict[str, Any] = {
            "metrics.json": metric_rows(self.ranks, cutoffs, **tested) + self.lists.rows(**tested),
            "validation.json": metric_rows(self.validation_ranks, cutoffs, **validated),
            "comparisons.json": comparison_rows(self.ranks, pairs, cutoffs, **tested),
            "strata.json": self._strata(tested),
            "fusion.json": self.fusions,
            "examples.json": examples,
            "diagnostics.json": self.diagnostics,
        }
        for name, table in tables.items():
            if table is not None:
                write_json(directory / name, table)

    def _keep_best(self, name: str, ranker: Ranker) -> None:
        """Keep the best items of each example, (examples, 10)."""
        if len(self._example_rows):
            self._best[name] = ranker.top_k(self.test.part(self._example_rows), TOP)

    def _example(self, number: int, row: int) -> dict[str, Any]:
        """Return a row of examples.json: {user, history, target, target_rank, top}.

        Args:
            number: of the example.
            row: of its user among the test users.
        """
        titles, test = self.dataset.titles, self.test
        return {
            "user": str(self.dataset.user_ids[int(test.user_rows[row])]),
            "history": [titles[item] for item in test.histories[row][-SHOWN_HISTORY:]],
            "target": titles[test.targets[row]],
            "target_rank": {name: int(self.ranks[name][row]) for name in self._best},
            "top": {name: [titles[item] for item in best[number] if item >= 0] for name, best in self._best.items()},
        }

    def _strata(self, bootstrap: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of strata.json, without the sanity checks."""
        lengths = np.array([len(history) for history in self.test.histories])
        popularity = self.dataset.train_counts_N[self.test.targets]
        strata: dict[str, npt.NDArray[Any]] = {"history length": lengths, "popularity": popularity}
        if (popularity == 0).any():
            strata["met in training"] = (popularity > 0).astype(np.int64)
        if self.neighbours:
            listed = [ranker.lists_targets(self.test) for ranker in self.neighbours.values()]
            strata["neighbour models that list the target"] = np.sum(listed, axis=0)
        plain = {name: value for name, value in self.ranks.items() if "/" not in name}
        return strata_rows(plain, strata, slots_and_rival(plain, self.main), **bootstrap)

    def _without_one(self, row: str, parts: dict[str, Ranker]) -> dict[str, Ranker]:
        """Return the fusions of all parts but one; without the first, the variant itself, it is a row of its own."""
        rankers: dict[str, Ranker] = {}
        for part in list(parts)[1:]:
            rest = {name: ranker for name, ranker in parts.items() if name != part}
            rankers |= self._fused(f"{row}{WITHOUT}{part}", rest)
        return rankers

    def _fused(self, row: str, parts: dict[str, Ranker]) -> dict[str, Ranker]:
        """Return the late fusion of some models, as the row of that name."""
        fusion = fuse(parts, self.validation, self.dataset.train_counts_N)
        for name in sorted(set(fusion.flat) - self._flat):
            self.say(f"{part_title(name)}: every item has the same score, so it adds nothing to a fusion")
        self._flat.update(fusion.flat)
        self.fusions[row] = fusion.parts
        return {row: fusion.ranker}

    def _learned(self, row: str, rankers: Mapping[str, Ranker]) -> dict[str, Ranker]:
        """Return the row of a late fusion's best items in a learned order, if one is asked for and can be learned.

        A validation user is ranked by an order that was learned without a half of the validation users, this one in it.
        """
        fusion = rankers.get(row)
        if not self.config.evaluate.learned_users or not isinstance(fusion, FusedRanker) or not fusion.taught:
            return {}
        learners = self._asked("validation", self.config.evaluate.learned_users, self.seed)
        examples = examples_of(fusion.taught, learners)
        validation = self.validation
        halves = [slice(half, None, 2) for half in range(2)]
        rest = [examples.without(validation.user_rows[half]) for half in halves]
        if (fewest := min(len(np.unique(each.user_rows)) for each in rest)) < FEWEST:
            if row == ID_ONLY + CHEAP:
                few = f"{fewest:,} of {len(np.unique(learners.user_rows)):,} validation users took one"
                self.say(f"no learned order: only {few} of their {CANDIDATES} best items; {FEWEST} are needed")
            return {}
        ranks_U = np.zeros(len(validation.user_rows), np.int64)
        for half, each in zip(halves, rest, strict=True):
            ranks_U[half] = LearnedRanker(fusion, learn(each)).ranks(validation.part(half), self.world)
        order = learn(examples)
        self.validation_ranks[row + LEARNED] = ranks_U
        self.fusions[row + LEARNED] = self.fusions[row]
        self.orders |= {f"{row + LEARNED}/{name}": np.asarray(array) for name, array in vars(order).items()}
        return {row + LEARNED: LearnedRanker(fusion, order)}

    def _rank_both(self, rankers: dict[str, Ranker], fusion: str) -> None:
        """Rank validation and test users by rows that can be deployed; describe the lists of the latter.

        Args:
            rankers: by row.
            fusion: the row whose best items are ordered anew.
        """
        self.validation_ranks |= rank_users(self.validation, rankers, self.world)
        rankers |= self._learned(fusion, rankers)
        self._rank(self.test, rankers, LISTED)
        if self.refitted:
            fusions = [row for row in rankers if self.fusions.get(row, {}).keys() & self.refitted.keys()]
            self._rank(self.test, {row + REFITTED: self._refit(row, rankers[row]) for row in fusions})

    def _refit(self, row: str, ranker: Ranker) -> Ranker:
        """Return a fusion, in a learned order or not, with its weights as they are and its baselines refitted."""
        fusion = ranker.fusion if isinstance(ranker, LearnedRanker) else ranker
        assert isinstance(fusion, FusedRanker)
        named = zip(self.fusions[row], fusion.parts, strict=True)
        again = replace(fusion, parts=tuple(self.refitted.get(name, part) for name, part in named))
        return replace(ranker, fusion=again) if isinstance(ranker, LearnedRanker) else again

    def _rank(self, batch: EvalBatch, rankers: dict[str, Ranker], top: int = 0) -> None:
        self.ranks |= rank_users(batch, rankers, self.world, top=top, listed=self.lists.add)
        for name in rankers:
            self.say(f"{name}: HR@10 {(self.ranks[name] <= 10).mean():.4f}, n = {len(self.ranks[name])}")

    def _write_ranks(self, path: Path) -> None:
        """Write a row for each question and variant: user, place among the user's questions, target, rank.

        Each variant is a row group.
        """
        test, dataset, places = self.test, self.dataset, pa.array(self.test.places)
        users, targets = dataset.user_ids.take(test.user_rows), dataset.item_ids.take(test.targets)
        columns = {"variant": pa.string(), "user": users.type, "place": pa.int64(), "target": targets.type}
        schema = pa.schema({**columns, "rank": pa.int64()})
        with pq.ParquetWriter(path, schema) as writer:
            for variant, values in self.ranks.items():
                variants = pa.repeat(pa.scalar(variant), len(values))
                writer.write_table(pa.table([variants, users, places, targets, pa.array(values)], schema=schema))
