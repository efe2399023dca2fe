"""Ranking every variant on the same users: encode a chunk, rank it, drop it; memory does not grow with the users.

Shape letters: B users of a chunk, U all users, N catalogue, Z size of a scored vector.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from rarec.data.dataset import EvalTargets, PreparedDataset
from rarec.ids.source import Source
from rarec.models.encode import Encoder
from rarec.ranking.rank import rank_shared, top_k
from rarec.world import SINGLE, World

Float32 = npt.NDArray[np.float32]
Ranks = npt.NDArray[np.int64]
Rows = npt.NDArray[np.integer]
USERS_AT_A_TIME = 2048


class Histories(Sequence[Rows]):
    """What stands before each user's target, made when asked for: a list of them would grow with the users."""

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
        return (
            history
            if self.shuffled_by is None
            else np.random.default_rng([self.shuffled_by, user]).permutation(history)
        )


@dataclass(frozen=True)
class EvalBatch:
    """Some users, what each has seen, and the item that follows.

    Attributes:
        user_rows: the users.
        histories: item rows before the target, oldest first: what a model reads.
        targets: item row of each user's target.
    """

    user_rows: Rows
    histories: Sequence[Rows]
    targets: Rows

    @classmethod
    def of(cls, dataset: PreparedDataset, targets: EvalTargets, shuffled_by: int | None = None) -> "EvalBatch":
        """The question that a part of the split asks; with a seed, every history in random order (sanity check)."""
        return cls(targets.user_rows, Histories(dataset, targets, shuffled_by), targets.item_rows)

    def chunks(self) -> Iterator["EvalBatch"]:
        """The same users, a bounded number at a time."""
        for start in range(0, len(self.user_rows), USERS_AT_A_TIME):
            part = slice(start, start + USERS_AT_A_TIME)
            yield EvalBatch(self.user_rows[part], self.histories[part], self.targets[part])


@dataclass(frozen=True)
class Ranker:
    """Anything that ranks: item vectors, and user vectors made from a history; score = dot product.

    Attributes:
        items_NZ: the catalogue's vectors.
        users: from rows and histories to vectors (B, Z), or (B, K, Z) where the best of K counts.
        lacking_N: items that have no vector of their own, and the mean item's in its place; None if there are none.
    """

    items_NZ: Float32
    users: Callable[[Rows, Sequence[Rows]], Float32]
    lacking_N: npt.NDArray[np.bool_] | None = None

    @classmethod
    def of_source(cls, source: Source) -> "Ranker":
        """The ID model itself."""
        lacking_N = (source.items_NE == 0).all(1)
        return cls(np.asarray(source.scored_NE), source.user_vectors, lacking_N if lacking_N.any() else None)

    @classmethod
    def of_counts(cls, counts_N: Rows) -> "Ranker":
        """Popularity: the log of how often each item was met, the same for all users."""
        logs_N1 = np.log1p(counts_N, dtype=np.float32)[:, None]
        return cls(logs_N1, lambda rows, histories: np.ones((len(rows), 1), np.float32))

    @classmethod
    def of_model(cls, encoder: Encoder) -> "Ranker":
        """A trained variant. The last chunk's vectors are remembered, for a fusion of it that ranks the same users next."""
        last: list[tuple[Sequence[Rows], Float32]] = []

        def users(rows: Rows, histories: Sequence[Rows]) -> Float32:
            if not last or last[0][0] is not histories:
                last[:] = [(histories, encoder.users(rows, histories))]
            return last[0][1]

        return cls(encoder.items(), users)

    def fused(self, other: "Ranker", weight: float, slope: float) -> "Ranker":
        """Late fusion: this one's score plus `weight` (not negative) times the other's, which is the best of its K.

        For an item that the other knows no vector of, its score is predicted from this one's: as many times `slope`
        from the user's mean as this one's is from its own.
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
        """Of the whole catalogue, (B, N)."""
        users = self.users(batch.user_rows, batch.histories)
        scores_BN: Float32 = (users.reshape(len(users), -1, self.items_NZ.shape[1]) @ self.items_NZ.T).max(1)
        return scores_BN

    def best(self, batch: EvalBatch, k: int) -> npt.NDArray[np.int64]:
        """The k best unseen items of each user, (B, k)."""
        users = self.users(batch.user_rows, batch.histories)
        return top_k(users, self.items_NZ, k, batch.histories)[0]


def rank_all(batch: EvalBatch, rankers: Mapping[str, Ranker], world: World = SINGLE) -> dict[str, Ranks]:
    """Rank of each target in the full catalogue by every ranker: earlier items excluded, ties against the model.

    Users go by in chunks, every ranker on one chunk before the next; the processes share each chunk.
    """
    ranks: dict[str, list[Ranks]] = {name: [] for name in rankers}
    for part in batch.chunks():
        for name, ranker in rankers.items():
            users = ranker.users(part.user_rows, part.histories)
            ranks[name].append(rank_shared(users, ranker.items_NZ, part.targets, part.histories, world))
    return {name: np.concatenate(parts) for name, parts in ranks.items()}
