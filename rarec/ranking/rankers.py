"""Full-catalogue ranking of every kind of model on the same users, a chunk of users at a time.

Everything that ranks goes through here: the validation of ID models and of variants, the evaluation, the examples of
the report, and recommendation.

Shape letters: B users of a chunk, U all users, N catalogue, K vectors of a user, Z size of a scored vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from rarec.distributed.world import CPU, SINGLE, World
from rarec.neighbours.scores import newest_first, score
from rarec.ranking.rank import USERS_AT_A_TIME, EvalBatch, Scores, VectorScores, best_scores, rank_scores

Float32 = npt.NDArray[np.float32]
Ranks = npt.NDArray[np.int64]
Rows = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]


class Ranker(ABC):
    """A model as ranking sees it.

    Attributes:
        knows_new: whether it has something to say of a new item, see `new_items`.
        lacking_N: marks items without a vector, which are scored as the mean item; None for none.
    """

    knows_new: bool = True
    lacking_N: Mask | None = None

    @abstractmethod
    def scored(self, chunk: EvalBatch) -> Scores:
        """Compute what the users of a chunk need once, such as their vectors; return their scores."""

    def unmet(self, rows: Rows) -> Float32 | None:
        """Return vectors of items as they are if no training has met them, (B, Z); None if they do not change."""
        return None

    def scores(self, batch: EvalBatch) -> Float32:
        """Return the scores of the whole catalogue, (B, N)."""
        scores_BN: Float32 = self.scored(batch).block(slice(0, len(batch.user_rows))).numpy(force=True)
        return scores_BN.copy()

    def ranks(self, batch: EvalBatch, world: World = SINGLE, users_at_a_time: int = USERS_AT_A_TIME) -> Ranks:
        """Return the rank of each target, (U,); see `rank_users`."""
        return rank_users(batch, {"": self}, world, users_at_a_time)[""]

    def top_k(self, batch: EvalBatch, k: int) -> npt.NDArray[np.int64]:
        """Return item rows of each user's k best unseen items, best first, (B, min(k, N)); -1 where none is left."""
        return best_scores(self.scored(batch), k, batch.seen)[0]


@dataclass(frozen=True)
class VectorRanker(Ranker):
    """Scores are dot products of user and item vectors.

    Attributes:
        items_NZ: the catalogue's vectors.
        users: maps user rows and histories to user vectors, (B, Z); or (B, K, Z), where the best of K scores counts.
        knows_new: see `Ranker`.
        lacking_N: see `Ranker`.
        device: where scores are computed.
        encode_unmet: computes what `Ranker.unmet` returns; None for a model whose vectors do not change.
    """

    items_NZ: Float32
    users: Callable[[Rows, Sequence[Rows]], Float32]
    knows_new: bool = True
    lacking_N: Mask | None = None
    device: torch.device = CPU
    encode_unmet: Callable[[Rows], Float32] | None = None

    @classmethod
    def of_counts(cls, counts_N: Rows) -> "VectorRanker":
        """Rank by popularity: the log of how often each item occurs in training, the same for all users."""
        return cls._constant(np.log1p(counts_N, dtype=np.float32))

    @classmethod
    def of_new(cls, new_N: Mask) -> "VectorRanker":
        """Rank new items before all others, the same for all users."""
        return cls._constant(new_N.astype(np.float32))

    @classmethod
    def _constant(cls, scores_N: Float32) -> "VectorRanker":
        return cls(scores_N[:, None], lambda rows, histories: np.ones((len(rows), 1), np.float32), knows_new=False)

    def unmet(self, rows: Rows) -> Float32 | None:
        """See `Ranker`."""
        return self.encode_unmet(rows) if self.encode_unmet else None

    def scored(self, chunk: EvalBatch) -> Scores:
        """See `Ranker`."""
        return VectorScores(self.users(chunk.user_rows, chunk.histories), self._placed)

    @cached_property
    def _placed(self) -> Float32 | torch.Tensor:
        """The catalogue's vectors, where scores are computed."""
        return self.items_NZ if self.device == CPU else torch.from_numpy(self.items_NZ).to(self.device)


@dataclass(frozen=True)
class NeighbourRanker(Ranker):
    """The root of the sum, over the newest items of the history, of their scores for an item, older ones decayed.

    Attributes:
        table_NN: score of each item's neighbours, 0 for all others.
        newest: number of items of the history that are read.
        decay: factor by each older item.
        knows_new: see `Ranker`.
    """

    table_NN: sparse.csr_matrix
    newest: int
    decay: float
    knows_new: bool = True

    def scored(self, chunk: EvalBatch) -> Scores:
        """See `Ranker`."""
        return NeighbourScores(self._newest_BN(chunk.histories), self.table_NN)

    def near(self, histories: Sequence[npt.NDArray[np.integer]]) -> sparse.csr_matrix:
        """Return the scores after some histories, (B, N): of the few items that are neighbours of one of theirs."""
        sums_BN = self._newest_BN(histories) @ self.table_NN
        sums_BN.data = score(sums_BN.data)
        return sums_BN

    def lists_targets(self, batch: EvalBatch) -> npt.NDArray[np.bool_]:
        """Return whether each user's target is a neighbour of the newest items of the history, (U,)."""
        listed = [np.empty(0, np.bool_)]
        for chunk in batch.chunks():
            sums_BN = self._newest_BN(chunk.histories) @ self.table_NN
            listed.append(np.asarray(sums_BN[np.arange(len(chunk.targets)), chunk.targets]).ravel() > 0)
        return np.concatenate(listed)

    def _newest_BN(self, histories: Sequence[npt.NDArray[np.integer]]) -> sparse.csr_matrix:
        """Return the weight of each item in each user's history: 1 for the newest, smaller for older ones."""
        items, weights, starts = newest_first(histories, self.newest, self.decay)
        return sparse.csr_matrix((weights.astype(np.float32), items, starts), (len(histories), self.table_NN.shape[0]))


class NeighbourScores:
    """Scores of a `NeighbourRanker`."""

    width = 2

    def __init__(self, histories_BN: sparse.csr_matrix, table_NN: sparse.csr_matrix) -> None:
        self._histories_BN, self._table_NN = histories_BN, table_NN
        self.n_users, self.n_items = (int(size) for size in histories_BN.shape)

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        sums_CN = (self._histories_BN[users] @ self._table_NN).toarray()
        return torch.from_numpy(score(sums_CN, out=sums_CN))


class CachedRanker(Ranker):
    """A ranker that computes what a chunk's users need once, for all fusions that it is a part of.

    What it computed is dropped with the chunk.

    Args:
        ranker: the model.
    """

    def __init__(self, ranker: Ranker) -> None:
        self._ranker = ranker
        self.knows_new, self.lacking_N = ranker.knows_new, ranker.lacking_N
        self._scores: WeakKeyDictionary[EvalBatch, Scores] = WeakKeyDictionary()
        self._unmet: dict[bytes, Float32 | None] = {}

    def scored(self, chunk: EvalBatch) -> Scores:
        """See `Ranker`."""
        if chunk not in self._scores:
            self._scores[chunk] = self._ranker.scored(chunk)
        return copy(self._scores[chunk])  # whose large buffer goes with it; the original lives as long as its chunk

    def unmet(self, rows: Rows) -> Float32 | None:
        """See `Ranker`; computed once, too."""
        key = rows.tobytes()
        if key not in self._unmet:
            self._unmet[key] = self._ranker.unmet(rows)
        return self._unmet[key]


@dataclass(frozen=True)
class UnmetRanker(Ranker):
    """A model of vectors as it is if no training has met some items.

    Attributes:
        ranker: the model.
        rows: of these items.
        items_BZ: their vectors; see `Ranker.unmet`.
    """

    ranker: Ranker
    rows: Rows
    items_BZ: Float32

    def scored(self, chunk: EvalBatch) -> Scores:
        """See `Ranker`."""
        return UnmetScores(self.ranker.scored(chunk), self.rows, self.items_BZ)


class UnmetScores:
    """Scores of an `UnmetRanker`: the users' vectors are those of the model."""

    def __init__(self, known: Scores, rows: Rows, items_BZ: Float32) -> None:
        assert isinstance(known, VectorScores)
        self._known, self._unmet, self._rows = known, known.of(items_BZ), torch.from_numpy(rows)
        self.n_users, self.n_items, self.width = known.n_users, known.n_items, known.width + 1

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        scores_CN = self._known.block(users)
        scores_CN[:, self._rows.to(scores_CN.device)] = self._unmet.block(users)
        return scores_CN


@dataclass(frozen=True)
class FusedRanker(Ranker):
    """Late fusion: the weighted sum of several models' scores.

    Attributes:
        parts: the models.
        weights: of their scores.
        new_weights: of their scores of new items.
        new_N: marks the new items.
        hidden_N: marks items that compete with no target where weights and orders are fitted; None for none.
        taught: the fusions by whose candidates orders are learned: one where those items are new that the weights were
            fitted with as new; if these are pretended, one where they are known, too.
    """

    parts: tuple[Ranker, ...]
    weights: tuple[float, ...]
    new_weights: tuple[float, ...]
    new_N: Mask
    hidden_N: Mask | None = None
    taught: tuple["FusedRanker", ...] = ()

    def scored(self, chunk: EvalBatch) -> "FusedScores":
        """See `Ranker`."""
        return FusedScores([part.scored(chunk) for part in self.parts], self)


class FusedScores:
    """Scores of a `FusedRanker`."""

    def __init__(self, parts: list[Scores], ranker: FusedRanker) -> None:
        self._parts, self._ranker, self.hidden_N = parts, ranker, ranker.hidden_N
        self.n_users, self.n_items = parts[0].n_users, parts[0].n_items
        self.width = sum(part.width for part in parts) + 1

    def parts(self, users: slice) -> Iterator[torch.Tensor]:
        """Yield the scores of each part, (C, N), on the first one's device."""
        first_CN = self._parts[0].block(users)
        yield first_CN
        yield from (scores.block(users).to(first_CN.device) for scores in self._parts[1:])

    def shares(self, users: slice) -> Iterator[torch.Tensor]:
        """Yield what each part adds to the score, (C, N)."""
        ranker = self._ranker
        for part_CN, weight, new_weight in zip(self.parts(users), ranker.weights, ranker.new_weights, strict=True):
            weights_N = np.where(ranker.new_N, new_weight, weight).astype(np.float32)
            yield torch.from_numpy(weights_N).to(part_CN.device) * part_CN

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        sum_CN = torch.zeros(())
        for share_CN in self.shares(users):
            sum_CN = sum_CN + share_CN
        return sum_CN


def new_items(counts_N: Rows, parts: Iterable[Ranker]) -> Mask:
    """Return marks of the items that no training has met, or the ID model has no vector of, (N,).

    Args:
        counts_N: training interactions of each item.
        parts: of a fusion.
    """
    new_N: Mask = counts_N == 0
    for part in parts:
        new_N = new_N if part.lacking_N is None else new_N | part.lacking_N
    return new_N


def rank_users(
    batch: EvalBatch,
    rankers: Mapping[str, Ranker],
    world: World = SINGLE,
    users_at_a_time: int = USERS_AT_A_TIME,
    top: int = 0,
    listed: Callable[[str, Ranks], object] = lambda name, best_BK: None,
) -> dict[str, Ranks]:
    """Return the rank of each target in the full catalogue, by every ranker.

    Seen items do not compete (see `EvalBatch`), and ties count against the model (see `rank_scores`). All rankers rank
    a chunk of users before the next chunk begins.

    Args:
        batch: users, histories and targets.
        rankers: by name.
        world: the processes that share each chunk; all of them must call this with the same arguments.
        users_at_a_time: size of a chunk.
        top: number K of each user's best unseen items that are listed, from the same scores; 0 lists none.
        listed: called on every process with a ranker's name and the item rows of a chunk's lists, (B, min(K, N)), as
            `Ranker.top_k` returns them.

    Returns:
        Ranks (U,) by name, 1 the best; the same on every process.

    Raises:
        UserError: a vector is not finite, or so large that scores would overflow.
    """
    ranks: dict[str, list[Ranks]] = {name: [np.empty(0, np.int64)] for name in rankers}
    for chunk in batch.chunks(users_at_a_time):
        for name, ranker in rankers.items():
            scores = ranker.scored(chunk)  # by all ranks together: a sharded model must be called equally often
            best_BK = np.zeros((scores.n_users, min(top, scores.n_items)), np.int64)
            ranks[name].append(_ranks_of_chunk(chunk, scores, world, best_BK))
            if top:
                listed(name, world.all_reduce_sum_(best_BK))
    return {name: np.concatenate(parts) for name, parts in ranks.items()}


def _ranks_of_chunk(chunk: EvalBatch, scores: Scores, world: World, best_BK: Ranks) -> Ranks:
    """Rank this process's share of the chunk, and fill its share of the best items; exchange the ranks."""
    own = slice(world.rank, None, world.size)
    ranks_B = np.zeros(len(chunk.user_rows), np.int64)
    ranks_B[own] = rank_scores(_Share(scores, own), chunk.targets[own], chunk.seen[own], best_BK=best_BK[own])
    return world.all_reduce_sum_(ranks_B)


class _Share:
    """The scores of one process's users, of every `step`-th."""

    def __init__(self, scores: Scores, own: slice) -> None:
        self._scores = scores
        self._own = range(scores.n_users)[own]
        self.n_users = len(self._own)
        self.n_items = scores.n_items
        self.width = scores.width

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        own = self._own[users]
        return self._scores.block(slice(own.start, own.stop, own.step))
