"""Training an ID model's objective: windows of the training sequences, and a sampled softmax over the item table.

Shape letters: N items, R items that occur in training, U users, W windows, B windows of a batch, T positions, P targets
of a batch, K states of a position, M negatives, E dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rarec.config.ids import Recipe
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.ids.models import SequenceModel, build

Ints = npt.NDArray[np.int64]

LENGTH_GROUPS = 4
"""Groups by length into which a batch is cut: most windows are far shorter than the longest, to which all would be
padded otherwise."""
PIECE = 256
"""Targets whose scores are computed at a time: the scores of all, a hundred megabytes, would not stay in cache."""
NOT_COUNTED = -1e30
"""A score that adds nothing to the softmax. Not minus infinity: if no negative counts, its gradient would be NaN."""


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

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[tuple[Ints, Ints]]:
        """Yield one epoch in random order: item rows (B, T + 1), padded on the right, and numbers of targets (B,)."""
        begin_W, length_W = self.cut(rng)
        order_W = rng.permutation(len(begin_W))
        for start in range(0, len(order_W), size):
            part = order_W[start : start + size]
            steps = np.arange(length_W[part].max() + 1)
            inside = np.minimum(steps, length_W[part, None])  # the padding repeats the last item
            yield self.item_rows_I[begin_W[part, None] + inside].astype(np.int64), length_W[part]


def draw_negatives(trained_R: torch.Tensor, wanted: int) -> torch.Tensor:
    """Draw item rows (M,) uniformly from the trained ones; return all of them if they are no more than `wanted`.

    With all of them the softmax is a full one.
    """
    return trained_R[torch.randint(len(trained_R), (wanted,))] if wanted < len(trained_R) else trained_R


class ModelWithItems(nn.Module):
    """An ID model with its item table, and its training loss.

    Args:
        settings: the recipe.
        trained_N: marks items that occur in training. The vectors of all others are zero and no step changes them: a
            zero vector means that the item has none.
    """

    def __init__(self, settings: Recipe, trained_N: torch.Tensor) -> None:
        super().__init__()
        self.items = nn.Embedding(len(trained_N), settings.dim)
        nn.init.normal_(self.items.weight, std=0.02)
        self.items.weight.data.mul_(trained_N[:, None])
        self.encoder = build(settings)

    def loss(self, rows: torch.Tensor, lengths_B: torch.Tensor, negatives_M: torch.Tensor) -> torch.Tensor:
        """Return the sampled softmax: the mean over all targets of -log p(target | target and negatives).

        Of several states of a position, the one with the highest score of the target counts (ComiRec's equation 8).

        Args:
            rows: windows of item rows, (B, T + 1), oldest first, padded on the right: inputs, and the item after each.
            lengths_B: number of targets in each window.
            negatives_M: item rows shared by all targets. A negative that equals a target does not count for it.
        """
        groups = [_LengthGroup.of(rows[at], lengths_B[at]) for at in _by_length(lengths_B)]
        positives_P = torch.cat([group.targets_P for group in groups])
        # One lookup for all, so that the gradient of the table is computed once.
        looked_up = [*(group.inputs_BT.flatten() for group in groups), positives_P, negatives_M]
        *inputs, positives_PE, negatives_ME = self.items(torch.cat(looked_up)).split([len(some) for some in looked_up])
        states_PKE = torch.cat([group.states(self.encoder, each) for group, each in zip(groups, inputs, strict=True)])
        best_P = torch.einsum("pke,pe->pk", states_PKE, positives_PE).argmax(1)
        states_PE = states_PKE[torch.arange(len(best_P)), best_P]
        positive_P = (states_PE * positives_PE).sum(dim=1)
        pieces = zip(states_PE.split(PIECE), positives_P.split(PIECE), strict=True)
        rest_P = torch.cat([_log_sum(some_PE @ negatives_ME.T, own_P, negatives_M) for some_PE, own_P in pieces])
        loss: torch.Tensor = (torch.logaddexp(positive_P, rest_P) - positive_P).mean()
        return loss


def _by_length(lengths_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return lengths_B.argsort(stable=True).chunk(LENGTH_GROUPS)


def _log_sum(scores_PM: torch.Tensor, own_P: torch.Tensor, negatives_M: torch.Tensor) -> torch.Tensor:
    """Return the log-sum-exp over the negatives that are not the target's own item, (P,); overwrite the scores."""
    return scores_PM.masked_fill_(own_P[:, None] == negatives_M, NOT_COUNTED).logsumexp(1)


@dataclass(frozen=True)
class _LengthGroup:
    """Windows of similar length, padded to the longest of them."""

    inputs_BT: torch.Tensor
    targets_P: torch.Tensor
    lengths_B: torch.Tensor
    real_BT: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, lengths_B: torch.Tensor) -> "_LengthGroup":
        longest = int(lengths_B.max())
        real_BT = torch.arange(longest) < lengths_B[:, None]
        return cls(rows[:, :longest], rows[:, 1 : longest + 1][real_BT], lengths_B, real_BT)

    def states(self, encoder: SequenceModel, inputs_E: torch.Tensor) -> torch.Tensor:
        """Return the encoder's states of the targets, (P, K, E), from the vectors of all inputs."""
        inputs_BTE = inputs_E.view(*self.inputs_BT.shape, -1)
        states_BTKE: torch.Tensor = encoder(inputs_BTE, self.lengths_B)
        expected = (*inputs_BTE.shape[:2], encoder.per_user, inputs_BTE.shape[2])
        if states_BTKE.shape != expected:  # of a model of the user's own
            problem = f"{type(encoder).__name__}.forward returns states of shape {tuple(states_BTKE.shape)}"
            raise UserError(f"field `ids.model`: {problem}", f"return (B, T, K, E), here {expected}")
        return states_BTKE[self.real_BT]
