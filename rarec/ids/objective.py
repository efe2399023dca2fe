"""What an ID model trains on, and its loss: windows of the training sequences, and a sampled softmax of each target.

Neither the order of the windows nor the draws of dropout depend on the number of ranks.

Shape letters: U users, or a step's items; W windows, B windows of a batch, b those of this rank, T positions, P targets
of this rank, K states of a position, M negatives, N items, E dimension.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ids.models import SequenceModel

Ints = npt.NDArray[np.int64]

PIECE = 256
"""Targets whose scores are computed at a time: the scores of all, a hundred megabytes, would not stay in cache."""
NOT_COUNTED = -1e30
"""A score that adds nothing to the softmax. Not minus infinity: if no negative counts, its gradient would be NaN."""
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
        return [self._group(rows_B, world) for rows_B in ordered]

    def _group(self, rows_B: Tensor, world: World) -> Group:
        longest = int(self.lengths_B[rows_B].max())
        own_b = rows_B[own_rows(len(rows_B), world)]
        has_own = world.rank < len(rows_B)
        lengths_b = self.lengths_B[own_b] if has_own else torch.zeros_like(own_b)  # nothing of a stand-in counts
        rows_bT = self.rows_BT[own_b]
        real_bT = torch.arange(longest) < lengths_b[:, None]
        inputs_bT, targets_P = rows_bT[:, :longest], rows_bT[:, 1 : longest + 1][real_bT]
        device = world.device
        return Group(inputs_bT.to(device), targets_P.to(device), lengths_b.to(device), real_bT.to(device), len(rows_B))


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


class SampledSoftmax:
    """The sum over targets of -log p(target | target and negatives), of one rank's windows.

    Its dropout draws alike on any number of ranks, so the losses of a training do not depend on that number.

    Args:
        encoder: the ID model; its dropout modules are replaced.
        world: the ranks that share each batch.
        dtype: of the encoder's and the scores' arithmetic.
    """

    def __init__(self, encoder: SequenceModel, world: World = SINGLE, dtype: torch.dtype = torch.float32) -> None:
        self.encoder, self.world, self.dtype = encoder, world, dtype
        self._dropouts = _share_dropout(encoder, world)

    def __call__(self, groups: Sequence[Group], negatives_M: Tensor, rows_U: Tensor, vectors_UE: Tensor) -> Tensor:
        """Return the sum.

        Of several states of a position, the one with the highest score of the target counts (ComiRec's equation 8).

        Args:
            groups: this rank's windows.
            negatives_M: item rows shared by all targets. A negative that equals a target does not count for it.
            rows_U: all item rows of these, sorted, each once.
            vectors_UE: their vectors.
        """
        with torch.autocast(vectors_UE.device.type, self.dtype, enabled=self.dtype != torch.float32):
            positives_P = torch.cat([group.targets_P for group in groups])
            # One look-up for all, so that the gradient of the vectors is computed once.
            wanted = [*(group.inputs_bT.flatten() for group in groups), positives_P, negatives_M]
            vectors_E = nn.functional.embedding(torch.searchsorted(rows_U, torch.cat(wanted)), vectors_UE)
            *inputs, positives_PE, negatives_ME = vectors_E.split([len(rows) for rows in wanted])
            states_PKE = torch.cat([self._states(group, own_E) for group, own_E in zip(groups, inputs, strict=True)])
            best_P = torch.einsum("pke,pe->pk", states_PKE, positives_PE).argmax(1)
            states_PE = states_PKE[torch.arange(len(best_P), device=best_P.device), best_P]
            positive_P = (states_PE * positives_PE).sum(1).float()
            pieces = zip(states_PE.split(PIECE), positives_P.split(PIECE), strict=True)
            rest_P = torch.cat([_log_sum(own_PE @ negatives_ME.T, own_P, negatives_M) for own_PE, own_P in pieces])
            loss: Tensor = (torch.logaddexp(positive_P, rest_P) - positive_P).sum()
        return loss

    def _states(self, group: Group, inputs_E: Tensor) -> Tensor:
        """Return the encoder's states of a group's targets, (P, K, E), from the vectors of its inputs."""
        inputs_bTE = inputs_E.view(*group.inputs_bT.shape, -1)
        for dropout in self._dropouts:
            dropout.total = group.total
        states_bTKE: Tensor = self.encoder(inputs_bTE, group.lengths_b)
        expected = (*inputs_bTE.shape[:2], self.encoder.per_user, inputs_bTE.shape[2])
        if states_bTKE.shape != expected:  # of a model of the user's own
            problem = f"{type(self.encoder).__name__}.forward returns states of shape {tuple(states_bTKE.shape)}"
            raise UserError(f"field `ids.model`: {problem}", f"return (B, T, K, E), here {expected}")
        return states_bTKE[group.real_bT]


def _log_sum(scores_PM: Tensor, own_P: Tensor, negatives_M: Tensor) -> Tensor:
    """Return the log-sum-exp over the negatives that are not the target's own item, (P,); overwrite the scores."""
    return scores_PM.float().masked_fill_(own_P[:, None] == negatives_M, NOT_COUNTED).logsumexp(1)


class _SharedDropout(nn.Module):
    """Dropout that draws for the windows of all ranks, and takes what is this rank's.

    Attributes:
        total: B, the windows of all ranks.
    """

    def __init__(self, probability: float, world: World) -> None:
        super().__init__()
        self.probability, self.world, self.total = probability, world, 0

    def forward(self, states_b: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return states_b
        dropped_B = _drawn(self.probability, (self.total, *states_b.shape[1:]), states_b.device)
        return states_b.masked_fill(dropped_B[own_rows(self.total, self.world)], 0.0) / (1 - self.probability)


def _drawn(probability: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a mask that is True with some probability, in steps of 2**-16: four draws cost one random number."""
    size = math.prod(shape)
    words = torch.empty(-(-size // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    return (words.view(torch.int16)[:size] < round(probability * 2**16) - 2**15).view(shape)


def _share_dropout(encoder: SequenceModel, world: World) -> list[_SharedDropout]:
    """Replace the dropout modules; return the new ones."""
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, _SharedDropout(child.p, world).train(child.training))
    return [module for module in encoder.modules() if isinstance(module, _SharedDropout)]
