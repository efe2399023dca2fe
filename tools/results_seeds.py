"""Average a run over its seeds: each user's metrics over the seeds, then means and intervals over users.

The bootstrap resamples users, so an interval covers the choice of users and not the choice of seeds.

Shape letters: U users.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rarec.data.tables import read_columns
from rarec.errors import UserError
from rarec.ranking.intervals import Floats, Interval, mean_intervals, paired_intervals
from rarec.ranking.metrics import metric_values

CUTOFFS = (10, 100)
"""The cutoffs of the headline's metrics."""


@dataclass(frozen=True)
class SeedMeans:
    """The metrics of each user under each variant of a run, averaged over seeds.

    Attributes:
        values: variant -> metric -> (U,), for the same users in the same order.
        users: ids of the users, in that order.
        targets: the users' targets, in that order.
        seeds: number of seeds averaged.
        left_out: number of users that only some of the seeds ranked.
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.
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
        tables = [read_columns(file) for file in files]
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
        """The number of users."""
        return len(self.users)

    def figures(self, variant: str) -> dict[str, Interval]:
        """Return every metric of a variant with its interval."""
        return mean_intervals(self.values[variant], self.resamples, self.seed)

    def differences(self, variant: str, baseline: str) -> dict[str, Interval]:
        """Return every metric of a variant minus that of another, paired by user."""
        return paired_intervals(self.values[variant], self.values[baseline], self.resamples, self.seed)

    def against(self, other: "SeedMeans", variant: str, others: str) -> "SeedMeans":
        """Pair a variant of this run, as `one`, with a variant of another run, as `other`, over the users of both.

        Raises:
            UserError: the two runs have no user in common, or a user has different targets.
        """
        its_rows = {user: at for at, user in enumerate(other.users)}
        own_rows = {user: at for at, user in enumerate(self.users)}
        common = [user for user in self.users if user in its_rows]
        if not common:
            raise UserError("no test user in common", "give both runs the same seed and evaluate.users")
        if any(self.targets[own_rows[user]] != other.targets[its_rows[user]] for user in common):
            raise UserError("other test targets", "compare runs of one split of one log")
        rows = {"one": (self.values[variant], own_rows), "other": (other.values[others], its_rows)}
        values = {
            side: {name: each[[at[user] for user in common]] for name, each in metrics.items()}
            for side, (metrics, at) in rows.items()
        }
        targets = [self.targets[own_rows[user]] for user in common]
        return SeedMeans(values, common, targets, self.seeds, 0, self.resamples, self.seed)


def _columns(table: pa.Table, *names: str) -> list[list[object]]:
    return [table[name].to_pylist() for name in names]


def _variants(table: pa.Table) -> list[str]:
    return [str(variant) for variant in pc.unique(table["variant"]).to_pylist()]


def _metrics(table: pa.Table, variant: str, users: Sequence[object]) -> dict[str, Floats]:
    """Return each metric of a variant for these users, in this order."""
    own = table.filter(pc.equal(table["variant"], variant))
    ranks = dict(zip(*_columns(own, "user", "rank"), strict=True))
    return metric_values(np.array([ranks[user] for user in users], np.int64), CUTOFFS)


def _mean(seeds: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    return {name: np.mean([one[name] for one in seeds], axis=0) for name in seeds[0]}
