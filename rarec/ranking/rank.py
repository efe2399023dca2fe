"""Users to rank for; their targets' ranks, or the best k, in the full catalogue, a block of scores at a time.

Shape letters: U all users, B users, N catalogue, D dimension, K interest vectors a user, C users of a block, S seen
pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rarec.data.dataset import EvalTargets, PreparedDataset
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError

Array = npt.NDArray[np.float32] | torch.Tensor
Rows = npt.NDArray[np.integer]

BLOCK_BYTES, BLOCK_USERS, MOST_BYTES = 16 << 20, 256, 256 << 20
"""A block holds the scores of `BLOCK_USERS` users: of more where that is under `BLOCK_BYTES`, of fewer, down to one,
where it is over `MOST_BYTES`. Each block reads the whole table of items, so blocks of few users are slow."""
USERS_AT_A_TIME = 2048
"""Default size of a chunk: memory does not grow with the number of users."""
GROUP = 64
"""Items of which the best score is found first, at the speed of memory, which `topk` is far from."""


class Histories(Sequence[Rows]):
    """The histories before each target, read when accessed: a list of all would grow with the users."""

    def __init__(self, dataset: PreparedDataset, targets: EvalTargets, newest: int | None, shuffled_by: int | None):
        self.dataset, self.targets, self.newest, self.shuffled_by = dataset, targets, newest, shuffled_by

    def __len__(self) -> int:
        return len(self.targets.user_rows)

    def __getitem__(self, index: Any) -> Any:
        """Return the history before one target, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        user = int(self.targets.user_rows[index])
        history = self.dataset.history(user, int(self.targets.positions[index]))[-(self.newest or 0) :]
        if self.shuffled_by is None:
            return history
        return np.random.default_rng([self.shuffled_by, user]).permutation(history)


@dataclass(frozen=True, eq=False)
class EvalBatch:
    """Users to rank for, with the items each has seen and the target that follows. A user may occur several times.

    Attributes:
        user_rows: rows of the users in the prepared dataset, (U,).
        histories: item rows before each target, oldest first: the model's input.
        targets: item row of each user's target, (U,); -1 where none is known.
        exclude_seen: whether the items of a history do not compete.
        kept: its chunks, if they were kept; see `keeping_chunks`.
    """

    user_rows: Rows
    histories: Sequence[Rows]
    targets: Rows
    exclude_seen: bool = True
    kept: tuple["EvalBatch", ...] = ()

    @classmethod
    def of(
        cls,
        dataset: PreparedDataset,
        targets: EvalTargets,
        *,
        newest: int | None = None,
        exclude_seen: bool = True,
        shuffled_by: int | None = None,
    ) -> "EvalBatch":
        """Build the batch of one part of the split.

        Args:
            dataset: prepared.
            targets: from `dataset.targets`.
            newest: number of items of a history that are known, the newest ones; None for all.
            exclude_seen: see `EvalBatch`.
            shuffled_by: seed by which every history is shuffled (sanity check); None keeps the order.
        """
        histories = Histories(dataset, targets, newest, shuffled_by)
        return cls(targets.user_rows, histories, targets.item_rows, exclude_seen)

    @property
    def seen(self) -> Sequence[Rows]:
        """The item rows that do not compete, by user."""
        return self.histories if self.exclude_seen else [np.empty(0, np.int64)] * len(self.user_rows)

    @property
    def places(self) -> Rows:
        """The number of each question among those of its user, from 1, (U,). The users are in order."""
        return np.arange(1, len(self.user_rows) + 1) - np.searchsorted(self.user_rows, self.user_rows)

    def part(self, places: slice | Rows) -> "EvalBatch":
        """Return some of the users."""
        histories = self.histories[places] if isinstance(places, slice) else [self.histories[at] for at in places]
        return EvalBatch(self.user_rows[places], histories, self.targets[places], self.exclude_seen)

    def keeping_chunks(self) -> "EvalBatch":
        """Return the same users with the same chunks at every call, so that a cached ranker computes each once."""
        return replace(self, kept=tuple(self.chunks()))

    def chunks(self, size: int = USERS_AT_A_TIME) -> Iterator["EvalBatch"]:
        """Yield the users in order, at most `size` at a time."""
        if self.kept and size == USERS_AT_A_TIME:
            yield from self.kept
            return
        for start in range(0, len(self.user_rows), size):
            yield self.part(slice(start, start + size))


class Scores(Protocol):
    """The scores of B users for the whole catalogue, computed a block at a time.

    Attributes:
        n_users: B.
        n_items: N.
        width: number of arrays of (C, N) that a block takes while it is computed.
    """

    n_users: int
    n_items: int
    width: int

    def block(self, users: slice) -> torch.Tensor:
        """Return the scores of some users, (C, N). They may be changed, and the next call may overwrite them."""


def rank_scores(
    scores: Scores,
    targets_B: Rows,
    seen: Sequence[Rows],
    *,
    first: int = 0,
    world: World = SINGLE,
    best_BK: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Return the rank of each user's target among all items that the user has not seen.

    Ties count against the model: rank = 1 + number of other unseen items whose score >= the target's. So a model that
    gives all items the same score gets the worst rank, not the best.

    Args:
        scores: of B users.
        targets_B: item row of each target.
        seen: each user's item rows that do not compete, in any order, repeated or not. A target always competes.
        first: with a catalogue that is spread over ranks, the first of the rows that this rank scores.
        world: the ranks over which it is spread; all of them call this with the same users.
        best_BK: filled with the rows of each user's K best unseen items, as `best_scores` returns them, from the same
            scores; K is at most N, and the catalogue on one rank.

    Returns:
        Ranks (B,), 1 the best, at most N.

    Raises:
        UserError: a vector is not finite, or so large that scores would overflow.
    """
    targets_B = np.asarray(targets_B, dtype=np.int64) - first
    ranks_B = np.empty(scores.n_users, dtype=np.int64)
    for part, scores_CN in _blocks(scores, world.all_reduce_max(scores.n_items)):
        threshold_C1 = _threshold(scores_CN, targets_B[part], world)
        at_least_C = _at_least(scores_CN, threshold_C1)  # counts the target itself: the 1
        user_S, item_S = seen_pairs(seen[part])
        item_S = item_S - first
        competes = (item_S >= 0) & (item_S < scores.n_items) & (item_S != targets_B[part][user_S])
        once = np.unique(user_S[competes] * scores.n_items + item_S[competes])  # none is to be subtracted twice
        user_S, item_S = np.divmod(once, scores.n_items)
        hit_S = (scores_CN[user_S, item_S] >= threshold_C1[user_S, 0]).cpu().numpy()
        ranks_B[part] = at_least_C - np.bincount(user_S[hit_S], minlength=len(at_least_C))
        if best_BK is not None and best_BK.shape[1]:
            best_BK[part], _ = _best(scores_CN, best_BK.shape[1], seen[part])
    return world.all_reduce_sum_(ranks_B)


def _threshold(scores_CN: torch.Tensor, targets_C: Rows, world: World) -> torch.Tensor:
    """Return the score of each user's target, (C, 1), from the rank that has it.

    It is read from the block itself: computed apart, rounding could separate it from its ties.
    """
    own_C1 = torch.from_numpy((targets_C >= 0) & (targets_C < scores_CN.shape[1]))[:, None].to(scores_CN.device)
    at_C1 = torch.from_numpy(targets_C.clip(0, scores_CN.shape[1] - 1))[:, None].to(scores_CN.device)
    score_C1 = scores_CN.gather(1, at_C1).masked_fill(~own_C1, -torch.inf)
    if world.size == 1:
        return score_C1
    return torch.from_numpy(world.all_reduce_max_(score_C1.cpu().numpy())).to(scores_CN.device)


def _at_least(scores_CN: torch.Tensor, threshold_C1: torch.Tensor) -> npt.NDArray[np.int64]:
    """Return the number of each user's scores that are at least a threshold, (C,)."""
    if scores_CN.device.type != "cpu":
        return (scores_CN >= threshold_C1).sum(dim=1).cpu().numpy()
    # numpy counts a mask many times as fast as torch, which sums it as 64-bit integers
    pairs = zip(scores_CN.numpy(), threshold_C1.numpy(), strict=True)
    return np.array([np.count_nonzero(scores_N >= least_1) for scores_N, least_1 in pairs], np.int64)


def best_scores(
    scores: Scores, k: int, seen: Sequence[Rows], excluded: Sequence[npt.NDArray[np.bool_] | None] = ()
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the k best unseen items of each user.

    Args:
        scores: of B users.
        k: number of items; at most N are returned.
        seen: for each user, item rows that must not be returned.
        excluded: for each user, a mask of further items that must not be returned, (N,), or None; users may share one.

    Returns:
        Item rows and scores, both (B, min(k, N)), best first. Where fewer than k unseen items are left, the row is
        -1 and the score -inf.

    Raises:
        UserError: a vector is not finite, or so large that scores would overflow.
    """
    k = min(k, scores.n_items)
    rows_BK = np.empty((scores.n_users, k), dtype=np.int64)
    scores_BK = np.empty((scores.n_users, k), dtype=np.float32)
    for part, scores_CN in _blocks(scores, scores.n_items):
        for own_N, excluded_N in zip(scores_CN, excluded[part], strict=False):
            if excluded_N is not None:
                own_N.masked_fill_(torch.from_numpy(excluded_N).to(own_N.device), -torch.inf)
        rows_BK[part], scores_BK[part] = _best(scores_CN, k, seen[part])
    return rows_BK, scores_BK


def _best(scores_CN: torch.Tensor, k: int, seen: Sequence[Rows]) -> tuple[Rows, npt.NDArray[np.float32]]:
    """Return the k best unseen items of a block's users; see `best_scores`. It changes the scores."""
    scores_CN[seen_pairs(seen)] = -torch.inf
    best_CK, row_CK = largest(scores_CN, k)
    row_CK[best_CK == -torch.inf] = -1
    return row_CK.cpu().numpy(), best_CK.cpu().numpy()


def largest(scores_CN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest scores of each user and their places, as `topk` does, several times faster.

    They are in the k groups of items with the largest maxima: each of these holds a score that none outside exceeds.
    """
    users, n_items = scores_CN.shape
    groups = n_items // GROUP
    if groups < 2 * k:
        best = scores_CN.topk(k, dim=1)
        return best.values, best.indices
    grouped = scores_CN[:, : groups * GROUP].view(users, groups, GROUP)
    first_CK = grouped.amax(dim=2).topk(k, dim=1, sorted=False).indices
    user_C1 = torch.arange(users, device=scores_CN.device)[:, None]
    among = torch.cat([grouped[user_C1, first_CK].flatten(1), scores_CN[:, groups * GROUP :]], dim=1)
    best_CK, at_CK = among.topk(k, dim=1)
    group = torch.nn.functional.pad(first_CK, (0, 1), value=groups)  # what is left over is a group, the last
    return best_CK, group.gather(1, at_CK // GROUP) * GROUP + at_CK % GROUP


def _blocks(scores: Scores, n_items: int) -> Iterator[tuple[slice, torch.Tensor]]:
    user_bytes = 4 * n_items * scores.width
    size = max(1, max(BLOCK_BYTES, min(BLOCK_USERS * user_bytes, MOST_BYTES)) // user_bytes)
    for start in range(0, scores.n_users, size):
        part = slice(start, min(start + size, scores.n_users))
        yield part, scores.block(part)


class VectorScores:
    """Scores that are dot products; of a user with several vectors, the best one (ComiRec, Cen et al. 2020).

    Args:
        users: user vectors, (B, D), or (B, K, D).
        items_ND: item vectors.

    Raises:
        UserError: dimensions differ, or an item vector is not finite.
    """

    def __init__(self, users: Array, items_ND: Array) -> None:
        self._items_ND = _tensor(items_ND)
        self._users = users if users.ndim == 3 else users[:, None]
        self.n_users, self.width, dim = (int(size) for size in self._users.shape)
        self.n_items = len(self._items_ND)
        if dim != self._items_ND.shape[1]:
            problem = f"user vectors have {dim} dimensions, item vectors {self._items_ND.shape[1]}"
            raise UserError(problem, "use user and item vectors of the same model")
        self._item_peak = _peak(self._items_ND, "item")
        self._out = self._items_ND.new_empty(0, self.n_items)

    def of(self, items_BD: Array) -> "VectorScores":
        """Return the scores of the same users for other items."""
        return VectorScores(self._users, _tensor(items_BD).to(self._items_ND.device))

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        users_CKD = _tensor(self._users[users]).to(self._items_ND.device)
        self._raise_if_overflow(_peak(users_CKD, "user"))
        rows = users_CKD.flatten(0, 1)
        if len(self._out) < len(rows):
            self._out = self._items_ND.new_empty(len(rows), self.n_items)
        scores = torch.mm(rows, self._items_ND.T, out=self._out[: len(rows)])
        if self.width > 1:
            scores = scores.view(-1, self.width, self.n_items).amax(dim=1)
        return scores

    def _raise_if_overflow(self, user_peak: float) -> None:
        """Check a bound of the scores: the product of two finite vectors may be infinite or NaN, which has no rank."""
        if user_peak * self._item_peak * self._items_ND.shape[1] > torch.finfo(torch.float32).max:
            problem = f"scores overflow: vectors reach {user_peak:.3g} (users) and {self._item_peak:.3g} (items)"
            raise UserError(problem, "lower the learning rate if training diverged; rescale imported vectors")


def _tensor(array: Array) -> torch.Tensor:
    """Convert to float32, without a copy where possible; torch warns about arrays that it may not write to."""
    if isinstance(array, torch.Tensor):
        return array.detach().to(torch.float32)
    array = np.asarray(array, dtype=np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _peak(vectors: torch.Tensor, kind: str) -> float:
    """Return the largest magnitude, in one pass that NaN and infinity survive."""
    low, high = (float(value) for value in vectors.aminmax()) if vectors.numel() else (0.0, 0.0)
    peak = max(abs(low), abs(high))
    if not np.isfinite([low, high]).all():
        bad = int((~torch.isfinite(vectors.flatten(1)).all(dim=1)).nonzero()[0])
        problem = f"{kind} vectors are not finite (first: row {bad} of this chunk)"
        raise UserError(problem, "lower the learning rate if training diverged; check imported vectors")
    return peak


def seen_pairs(seen: Sequence[Rows]) -> tuple[Rows, Rows]:
    """Return all (user in the chunk, item) pairs."""
    lengths = [len(rows) for rows in seen]
    user_S = np.repeat(np.arange(len(seen)), lengths)
    item_S = np.concatenate(seen).astype(np.int64) if sum(lengths) else np.empty(0, dtype=np.int64)
    return user_S, item_S
