"""One evaluation: every variant, fusion and sanity check ranks the full catalogue for the same test users."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from rarec.config import RunConfig
from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import World
from rarec.evaluation.external import external_ranks
from rarec.evaluation.fusion import fuse
from rarec.evaluation.learned import FEWEST, examples_of, learn
from rarec.evaluation.lists import ListMetrics
from rarec.evaluation.results import ALL_CHEAP, CHEAP, FUSED, ID_ONLY, LEARNED, LISTED, ORACLE, WITHOUT, part_title
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
        neighbours: rankers of the neighbour models, by name.
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
        self.config, self.dataset, self.neighbours, self.world, self.say = config, dataset, neighbours, world, say
        self.main, self.seed = config.main_variant.name, config.run.seed
        self.targets = dataset.targets("test", config.evaluate.users, USERS_SEED)
        self.test = EvalBatch.of(dataset, self.targets)
        validation = dataset.targets("validation", config.train.validation_users, self.seed)
        self.validation = EvalBatch.of(dataset, validation).keeping_chunks()
        self.external = external_ranks(config.evaluate.external, dataset, self.test, say)  # before hours of ranking
        self.ids: Ranker = CachedRanker(ids)
        self.cheap: dict[str, Ranker] = {**neighbours, "popularity": VectorRanker.of_counts(dataset.train_counts_N)}
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
            shuffled = EvalBatch.of(self.dataset, self.targets, self.seed)
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
        pairs = pairs_of_interest(self.ranks, main)
        examples = [self._example(number, row) for number, row in enumerate(self._example_rows)]
        tables: dict[str, Any] = {
            "metrics.json": metric_rows(self.ranks, cutoffs, **self._bootstrap) + self.lists.rows(**self._bootstrap),
            "validation.json": metric_rows(self.validation_ranks, cutoffs, **self._bootstrap),
            "comparisons.json": comparison_rows(self.ranks, pairs, cutoffs, **self._bootstrap),
            "strata.json": self._strata(),
            "fusion.json": self.fusions,
            "examples.json": examples,
            "diagnostics.json": self.diagnostics,
        }
        for name, table in tables.items():
            if table is not None:
                write_json(directory / name, table)

    def _keep_best(self, name: str, ranker: Ranker) -> None:
        """Keep the best items of each example, (examples, 10)."""
        test, rows = self.test, self._example_rows
        if len(rows):
            examples = EvalBatch(test.user_rows[rows], [test.histories[row] for row in rows], test.targets[rows])
            self._best[name] = ranker.top_k(examples, TOP)

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
        targets = self.dataset.targets("validation", self.config.evaluate.learned_users, self.seed)
        examples = examples_of(fusion.taught, EvalBatch.of(self.dataset, targets))
        validation = self.validation
        halves = [slice(half, None, 2) for half in range(2)]
        rest = [examples.without(validation.user_rows[half]) for half in halves]
        if (fewest := min(len(np.unique(each.user_rows)) for each in rest)) < FEWEST:
            if row == ID_ONLY + CHEAP:
                few = f"{fewest:,} of {len(targets.user_rows):,} validation users took one of their {CANDIDATES} best"
                self.say(f"no learned order, since only {few} items; {FEWEST} are needed")
            return {}
        ranks_U = np.zeros(len(validation.user_rows), np.int64)
        for half, each in zip(halves, rest, strict=True):
            own = EvalBatch(validation.user_rows[half], validation.histories[half], validation.targets[half])
            ranks_U[half] = LearnedRanker(fusion, learn(each)).ranks(own, self.world)
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
        self._rank(self.test, rankers | self._learned(fusion, rankers), LISTED)

    def _rank(self, batch: EvalBatch, rankers: dict[str, Ranker], top: int = 0) -> None:
        self.ranks |= rank_users(batch, rankers, self.world, top=top, listed=self.lists.add)
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
