"""Full-catalogue ranking of every kind of model on the same users, a chunk of users at a time.

Everything that ranks goes through here: the validation of ID models and of variants, the evaluation, the examples of
the report, and recommendation.

Shape letters: B users of a chunk, U all users, N catalogue, K vectors of a user, Z size of a scored vector.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import numpy.typing as npt

from rarec.data.dataset import EvalTargets, PreparedDataset
from rarec.ranking.rank import rank_targets, top_k
from rarec.world import SINGLE, World

Float32 = npt.NDArray[np.float32]
Ranks = npt.NDArray[np.int64]
Rows = npt.NDArray[np.integer]
USERS_AT_A_TIME = 2048
"""Default size of a chunk: memory does not grow with the number of users."""


class Histories(Sequence[Rows]):
    """The histories before each user's target, read when accessed: a list of all would grow with the users."""

    def __init__(self, dataset: PreparedDataset, targets: EvalTargets, shuffled_by: int | None = None) -> None:
        self.dataset, self.targets, self.shuffled_by = dataset, targets, shuffled_by

    def __len__(self) -> int:
        return len(self.targets.user_rows)

    @overload
    def __getitem__(self, at: int) -> Rows: ...

    @overload
    def __getitem__(self, at: slice) -> list[Rows]: ...

    def __getitem__(self, at: int | slice) -> Rows | list[Rows]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        user = int(self.targets.user_rows[at])
        history = self.dataset.history(user, int(self.targets.positions[at]))
        if self.shuffled_by is None:
            return history
        return np.random.default_rng([self.shuffled_by, user]).permutation(history)


@dataclass(frozen=True)
class EvalBatch:
    """Users to rank for, with the items each has seen and the target that follows.

    Attributes:
        user_rows: rows of the users in the prepared dataset, (U,).
        histories: item rows before each target, oldest first: the model's input, and the items that do not compete.
        targets: item row of each user's target, (U,).
    """

    user_rows: Rows
    histories: Sequence[Rows]
    targets: Rows

    @classmethod
    def of(cls, dataset: PreparedDataset, targets: EvalTargets, shuffled_by: int | None = None) -> "EvalBatch":
        """Build the batch of one part of the split.

        Args:
            dataset: prepared.
            targets: from `dataset.targets`.
            shuffled_by: seed by which every history is shuffled (sanity check); None keeps the order.
        """
        return cls(targets.user_rows, Histories(dataset, targets, shuffled_by), targets.item_rows)

    def chunks(self, size: int = USERS_AT_A_TIME) -> Iterator["EvalBatch"]:
        """Yield the users in order, at most `size` at a time."""
        for start in range(0, len(self.user_rows), size):
            part = slice(start, start + size)
            yield EvalBatch(self.user_rows[part], self.histories[part], self.targets[part])


@dataclass(frozen=True)
class Ranker:
    """A model as ranking sees it: item vectors, and a function that makes user vectors. Score = dot product.

    Attributes:
        items_NZ: the catalogue's vectors.
        users: maps user rows and histories to user vectors, (B, Z); or (B, K, Z), where the best of K scores counts.
        lacking_N: marks items without a vector of their own, which are scored as the mean item; None if there are none.
    """

    items_NZ: Float32
    users: Callable[[Rows, Sequence[Rows]], Float32]
    lacking_N: npt.NDArray[np.bool_] | None = None

    @classmethod
    def of_counts(cls, counts_N: Rows) -> "Ranker":
        """Rank by popularity: the log of how often each item occurs in training, the same for all users."""
        logs_N1 = np.log1p(counts_N, dtype=np.float32)[:, None]
        return cls(logs_N1, lambda rows, histories: np.ones((len(rows), 1), np.float32))

    def cached(self) -> "Ranker":
        """Return a ranker that keeps the last chunk's user vectors, for a fusion that ranks the same chunk next."""
        last: list[tuple[Sequence[Rows], Float32]] = []

        def users(rows: Rows, histories: Sequence[Rows]) -> Float32:
            if not last or last[0][0] is not histories:
                last[:] = [(histories, self.users(rows, histories))]
            return last[0][1]

        return replace(self, users=users)

    def fused(self, other: "Ranker", weight: float, slope: float) -> "Ranker":
        """Return the late fusion of two rankers: this one's score plus `weight` times the other's.

        Args:
            other: its score is the best of its K.
            weight: not negative.
            slope: of the other's score over this one's. For an item that the other has no vector of, the other's score
                is predicted: its deviation from the user's mean is `slope` times the deviation of this one's score.
        """

        def users(rows: Rows, histories: Sequence[Rows]) -> Float32:
            others_BKE = other.users(rows, histories).reshape(len(rows), -1, other.items_NZ.shape[1])
            own_BKZ = np.repeat(self.users(rows, histories)[:, None], others_BKE.shape[1], 1)
            return np.concatenate([own_BKZ, weight * others_BKE], 2, dtype=np.float32)

        own_NZ = self.items_NZ
        if other.lacking_N is not None:
            mean_Z = own_NZ[~other.lacking_N].mean(0)
            expected_NZ = own_NZ + weight * slope * (own_NZ - mean_Z)
            own_NZ = np.where(other.lacking_N[:, None], expected_NZ, own_NZ)
        return Ranker(np.concatenate([own_NZ, other.items_NZ], 1), users)

    def scores(self, batch: EvalBatch) -> Float32:
        """Return the scores of the whole catalogue, (B, N)."""
        users = self.users(batch.user_rows, batch.histories)
        scores_BN: Float32 = (users.reshape(len(users), -1, self.items_NZ.shape[1]) @ self.items_NZ.T).max(1)
        return scores_BN

    def ranks(self, batch: EvalBatch, world: World = SINGLE, users_at_a_time: int = USERS_AT_A_TIME) -> Ranks:
        """Return the rank of each target, (U,); see `rank_users`."""
        return rank_users(batch, {"": self}, world, users_at_a_time)[""]

    def top_k(self, batch: EvalBatch, k: int) -> npt.NDArray[np.int64]:
        """Return item rows of each user's k best unseen items, best first, (B, min(k, N)); -1 where none is left."""
        users = self.users(batch.user_rows, batch.histories)
        return top_k(users, self.items_NZ, k, batch.histories)[0]


def rank_users(
    batch: EvalBatch,
    rankers: Mapping[str, Ranker],
    world: World = SINGLE,
    users_at_a_time: int = USERS_AT_A_TIME,
) -> dict[str, Ranks]:
    """Return the rank of each target in the full catalogue, by every ranker.

    Seen items do not compete, and ties count against the model (see `rank_targets`). All rankers rank a chunk of users
    before the next chunk begins.

    Args:
        batch: users, histories and targets.
        rankers: by name.
        world: the processes that share each chunk; all of them must call this with the same arguments.
        users_at_a_time: size of a chunk.

    Returns:
        Ranks (U,) by name, 1 the best; the same on every process.

    Raises:
        UserError: a vector is not finite, or so large that scores would overflow.
    """
    ranks: dict[str, list[Ranks]] = {name: [np.empty(0, np.int64)] for name in rankers}
    for chunk in batch.chunks(users_at_a_time):
        for name, ranker in rankers.items():
            ranks[name].append(_ranks_of_chunk(chunk, ranker, world))
    return {name: np.concatenate(parts) for name, parts in ranks.items()}


def _ranks_of_chunk(chunk: EvalBatch, ranker: Ranker, world: World) -> Ranks:
    """Rank this process's share of the chunk; exchange the ranks."""
    users, own = ranker.users(chunk.user_rows, chunk.histories), slice(world.rank, None, world.size)
    ranks_B = np.zeros(len(users), np.int64)
    ranks_B[own] = rank_targets(users[own], ranker.items_NZ, chunk.targets[own], chunk.histories[own])
    return world.all_reduce_sum_(ranks_B)
