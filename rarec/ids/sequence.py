"""What all ID models trained here share: they read item vectors in order and recommend after each of them.

Shape letters: B sequences, T positions, K states of a position, E dimension, N catalogue.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

ENCODE_BATCH = 1024
"""Histories encoded at a time: memory does not depend on how many are given."""

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]


class SequenceModel(nn.Module, ABC):
    """Item vectors in order -> K states after each; the score of item i is the largest (state) . e_i, without a bias.

    The item table is no part of the module: inputs and scores share it, the artefact stores it apart for whoever wants
    item vectors, and a sanity check swaps it.

    Attributes:
        max_history: the newest interactions that are read.
        per_user: K.
    """

    max_history: int
    per_user: int = 1

    @abstractmethod
    def forward(self, items_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """States after each position, (B, T, K, E); none depends on a later item.

        Args:
            items_BTE: item vectors, oldest first, padded on the right: a causal state never sees the padding.
            lengths_B: how many positions of each sequence are real.
        """

    @torch.no_grad()
    def encode(self, items_NE: Floats, histories: Sequence[Rows]) -> Floats:
        """The states after the last interaction of each history, (B, K, E), without dropout.

        Args:
            items_NE: the item table, in memory or memory-mapped.
            histories: item rows, oldest first; only the newest `max_history` are read. An empty history gives zero
                vectors, which score every item alike.
        """
        users_BKE = np.zeros((len(histories), self.per_user, items_NE.shape[1]), dtype=np.float32)
        known = np.flatnonzero([len(history) > 0 for history in histories])
        training, _ = self.training, self.eval()
        for start in range(0, len(known), ENCODE_BATCH):
            part = known[start : start + ENCODE_BATCH]
            rows_BT, lengths_B = pad([histories[user] for user in part], self.max_history)
            lengths = torch.from_numpy(lengths_B)
            states_BTKE = self(torch.from_numpy(np.asarray(items_NE[rows_BT])), lengths)
            users_BKE[part] = states_BTKE[torch.arange(len(part)), lengths - 1].numpy()
        self.train(training)
        return users_BKE


def pad(histories: Sequence[Rows], max_history: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The newest `max_history` rows of each history, padded on the right with row 0.

    Returns:
        Rows (B, T), T the longest of them, and their lengths (B,).
    """
    newest = [history[-max_history:] for history in histories]
    lengths_B = np.array([len(history) for history in newest], dtype=np.int64)
    rows_BT = np.zeros((len(newest), lengths_B.max(initial=0)), dtype=np.int64)
    if newest:
        rows_BT[np.arange(rows_BT.shape[1]) < lengths_B[:, None]] = np.concatenate(newest)
    return rows_BT, lengths_B
