"""What an ID model trains on: windows of the training sequences, in an order that no number of ranks changes.

Shape letters: U users, W windows, B windows of a batch, b those of this rank, T positions, P targets, N items.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import World

Ints = npt.NDArray[np.int64]

LENGTH_GROUPS = 4
"""Groups by length into which a batch is cut: most windows are far shorter than the longest, to which all would be
padded otherwise."""


@dataclass(frozen=True)
class Group:
    """Windows of similar length, padded to the longest of them: those of this rank.

    Attributes:
        inputs_bT: item rows, oldest first, padded on the right.
        targets_P: item row after each input that is real.
        lengths_b: number of targets of each window.
        real_bT: marks inputs that are no padding.
        total: B, the windows of all ranks.
    """

    inputs_bT: Tensor
    targets_P: Tensor
    lengths_b: Tensor
    real_bT: Tensor
    total: int


@dataclass(frozen=True)
class Batch:
    """The windows of one step, those of all ranks.

    Attributes:
        rows_BT: item rows, (B, T + 1), oldest first, padded on the right: inputs, and the item after each.
        lengths_B: number of targets in each window.
    """

    rows_BT: Tensor
    lengths_B: Tensor

    @property
    def n_targets(self) -> int:
        """The number of targets."""
        return int(self.lengths_B.sum())

    def groups(self, world: World) -> list[Group]:
        """Return this rank's windows. All ranks have as many groups, each as long, so that they draw alike."""
        ordered = self.lengths_B.argsort(stable=True).chunk(LENGTH_GROUPS)
        return [self._group(at_B, world) for at_B in ordered]

    def _group(self, at_B: Tensor, world: World) -> Group:
        longest = int(self.lengths_B[at_B].max())
        own_b = at_B[own_rows(len(at_B), world)]
        has_own = world.rank < len(at_B)
        lengths_b = self.lengths_B[own_b] if has_own else torch.zeros_like(own_b)  # nothing of a stand-in counts
        rows_bT = self.rows_BT[own_b]
        real_bT = torch.arange(longest) < lengths_b[:, None]
        inputs_bT, targets_P = rows_bT[:, :longest], rows_bT[:, 1 : longest + 1][real_bT]
        device = world.device
        return Group(inputs_bT.to(device), targets_P.to(device), lengths_b.to(device), real_bT.to(device), len(at_B))


def own_rows(total: int, world: World) -> slice:
    """Return this rank's rows among B = `total`; the first one where it has none."""
    return slice(world.rank, total, world.size) if world.rank < total else slice(0, 1)


class Windows:
    """Runs of consecutive training interactions: at most `max_history` inputs, and the item after each input.

    Every training interaction except a user's first is a target exactly once an epoch. A longer sequence is cut at a
    phase drawn anew each epoch, so that an item is seen at every position and with different context. (Our choice. The
    original reads only the newest window. On MovieLens-100K, test HR@10: newest .118, all windows at fixed cuts .100,
    at random cuts .178, because position embeddings overfit fixed cuts.)

    Args:
        dataset: only each user's training part is read.
        max_history: number of inputs of a window.
    """

    def __init__(self, dataset: PreparedDataset, max_history: int) -> None:
        users = np.flatnonzero(dataset.train_length_U >= 2)
        self.max_history = max_history
        self.item_rows_I = dataset.item_rows_I
        self.first_U = dataset.starts_U[users].astype(np.int64)
        self.targets_U = dataset.train_length_U[users].astype(np.int64) - 1

    def cut(self, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Return the start of each window in `item_rows_I` and its number of targets, both (W,)."""
        longest = self.max_history
        phase_U = np.where(self.targets_U > longest, rng.integers(longest, size=len(self.targets_U)), 0)
        count_U = -(-(self.targets_U + phase_U) // longest)
        user_W = np.repeat(np.arange(len(count_U)), count_U)
        index_W = np.arange(len(user_W)) - np.repeat(np.cumsum(count_U) - count_U, count_U)  # 0 is the newest
        high_W = self.targets_U[user_W] - np.maximum(index_W * longest - phase_U[user_W], 0)
        low_W = np.maximum(self.targets_U[user_W] - ((index_W + 1) * longest - phase_U[user_W]), 0)
        return self.first_U[user_W] + low_W, high_W - low_W

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield one epoch in random order."""
        begin_W, length_W = self.cut(rng)
        order_W = rng.permutation(len(begin_W))
        for start in range(0, len(order_W), size):
            part = order_W[start : start + size]
            steps = np.arange(length_W[part].max() + 1)
            inside = np.minimum(steps, length_W[part, None])  # the padding repeats the last item
            rows_BT = self.item_rows_I[begin_W[part, None] + inside].astype(np.int64)
            yield Batch(torch.from_numpy(rows_BT), torch.from_numpy(length_W[part]))


def draw_negatives(trained_R: Tensor, wanted: int) -> Tensor:
    """Draw item rows (M,) uniformly from the trained ones; return all of them if they are no more than `wanted`.

    With all of them the softmax is a full one.
    """
    return trained_R[torch.randint(len(trained_R), (wanted,))] if wanted < len(trained_R) else trained_R
