"""One run trained with several seeds: each user's metrics averaged over them, and intervals over users (ours).

A bootstrap over users of these means says what another draw of users would have brought, and nothing of other seeds.

Shape letters: U users.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rarec.errors import UserError
from rarec.ranking.intervals import Floats, Interval, mean_intervals, paired_intervals
from rarec.ranking.metrics import metric_values

CUTOFFS = (10, 100)
"""Of the headline's metrics."""


@dataclass(frozen=True)
class SeedMeans:
    """The variants of a run, user by user, averaged over seeds.

    Attributes:
        values: of each variant and metric, (U,); the same users in the same order everywhere.
        users: their ids, in that order.
        targets: theirs, in that order.
        seeds: how many were averaged.
        left_out: users that only some of the seeds ranked.
        resamples: of the bootstrap.
        seed: of its draws.
    """

    values: Mapping[str, Mapping[str, Floats]]
    users: Sequence[object]
    targets: Sequence[object]
    seeds: int
    left_out: int
    resamples: int = 2000
    seed: int = 0

    @classmethod
    def read(cls, files: Sequence[Path], resamples: int = 2000, seed: int = 0) -> "SeedMeans":
        """Average `evaluation/ranks.parquet` of each seed over the users and variants that all of them have.

        Raises:
            UserError: a user's target differs between seeds, or no user was ranked under all of them.
        """
        tables = [pq.read_table(file) for file in files]
        everyone = [dict(zip(*_columns(table, "user", "target"), strict=True)) for table in tables]
        users = [user for user in everyone[0] if all(user in one for one in everyone)]
        for file, one in zip(files, everyone, strict=True):
            other = next((user for user in users if one[user] != everyone[0][user]), None)
            if other is not None:
                problem = f"{file}: user {other!r} has another target than in {files[0]}"
                raise UserError(problem, "seeds of one run must be evaluated on the same split")
        if not users:
            raise UserError(f"no user was ranked in all of {', '.join(map(str, files))}", "leave evaluate.users out")
        variants = [variant for variant in _variants(tables[0]) if all(variant in _variants(table) for table in tables)]
        values = {variant: _mean([_metrics(table, variant, users) for table in tables]) for variant in variants}
        targets = [everyone[0][user] for user in users]
        return cls(values, users, targets, len(files), len(set().union(*everyone)) - len(users), resamples, seed)

    @property
    def n(self) -> int:
        """U."""
        return len(self.users)

    def figures(self, variant: str) -> dict[str, Interval]:
        """Every metric of a variant."""
        return mean_intervals(self.values[variant], self.resamples, self.seed)

    def differences(self, variant: str, baseline: str) -> dict[str, Interval]:
        """Every metric of a variant minus that of another, user by user."""
        return paired_intervals(self.values[variant], self.values[baseline], self.resamples, self.seed)

    def against(self, other: "SeedMeans", variant: str, others: str) -> "SeedMeans":
        """A variant of this run as `ours` and one of another run as `theirs`, over the users that both ranked.

        Raises:
            UserError: there is none, or the target of one is not the same in both.
        """
        theirs = {user: at for at, user in enumerate(other.users)}
        own = {user: at for at, user in enumerate(self.users)}
        common = [user for user in self.users if user in theirs]
        if not common:
            raise UserError("no test user in common", "give both runs the same seed and evaluate.users")
        if any(self.targets[own[user]] != other.targets[theirs[user]] for user in common):
            raise UserError("other test targets", "compare runs of one split of one log")
        rows = {"ours": (self.values[variant], own), "theirs": (other.values[others], theirs)}
        values = {
            side: {name: each[[at[user] for user in common]] for name, each in metrics.items()}
            for side, (metrics, at) in rows.items()
        }
        targets = [self.targets[own[user]] for user in common]
        return SeedMeans(values, common, targets, self.seeds, 0, self.resamples, self.seed)


def _columns(table: pa.Table, *names: str) -> list[list[object]]:
    return [table[name].to_pylist() for name in names]


def _variants(table: pa.Table) -> list[str]:
    return [str(variant) for variant in pc.unique(table["variant"]).to_pylist()]


def _metrics(table: pa.Table, variant: str, users: Sequence[object]) -> dict[str, Floats]:
    """Of these users, in this order."""
    own = table.filter(pc.equal(table["variant"], variant))
    ranks = dict(zip(*_columns(own, "user", "rank"), strict=True))
    return metric_values(np.array([ranks[user] for user in users], np.int64), CUTOFFS)


def _mean(seeds: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    return {name: np.mean([one[name] for one in seeds], axis=0) for name in seeds[0]}
