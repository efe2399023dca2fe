"""SASRec (Kang & McAuley 2018, "Self-Attentive Sequential Recommendation"), in plain torch.

Shape letters: B sequences, T positions, E dimension, H attention heads, N catalogue.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from rarec.errors import UserError

ENCODE_BATCH = 1024
"""Histories encoded at a time: memory does not depend on how many are given."""

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]


class SasRec(nn.Module):
    """Item vectors in order -> a state after each of them; the score of item i is (last state) . e_i, without a bias.

    The item table is no part of the module: inputs and scores share it (section 3.4), the artefact stores it apart
    for whoever wants item vectors, and a probe swaps it.

    Args:
        dim: E, of item vectors and states.
        blocks: self-attention blocks.
        heads: attention heads; must divide `dim`.
        max_history: the newest interactions that are read.
        dropout: on the embeddings and on what each sub-layer adds.

    Raises:
        UserError: `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, blocks: int, heads: int, max_history: int, dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"ids.sasrec: {heads} heads do not divide dim {dim}", "choose heads that do")
        self.max_history = max_history
        self.positions = nn.Embedding(max_history, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, items_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """States after each position, (B, T, E).

        Args:
            items_BTE: item vectors, oldest first, padded on the right: a causal state never sees the padding.
            lengths_B: how many positions of each sequence are real. Positions count back from the newest item, so
                the state that recommends always stands at the same one.
        """
        steps_T = torch.arange(items_BTE.shape[1])
        position_BT = (self.max_history - lengths_B[:, None] + steps_T).clamp(max=self.max_history - 1)
        states_BTE = items_BTE * items_BTE.shape[-1] ** 0.5 + self.positions(position_BT)
        states_BTE = self.dropout(states_BTE)
        for block in self.blocks:
            states_BTE = block(states_BTE)
        normed_BTE: torch.Tensor = self.norm(states_BTE)
        return normed_BTE

    @torch.no_grad()
    def encode(self, items_NE: Floats, histories: Sequence[Rows]) -> Floats:
        """The state after the last interaction of each history, (B, E), without dropout.

        Args:
            items_NE: the item table, in memory or memory-mapped.
            histories: item rows, oldest first; only the newest `max_history` are read. An empty history gives the
                zero vector, which scores every item alike.
        """
        users_BE = np.zeros((len(histories), items_NE.shape[1]), dtype=np.float32)
        known = np.flatnonzero([len(history) > 0 for history in histories])
        training, _ = self.training, self.eval()
        for start in range(0, len(known), ENCODE_BATCH):
            part = known[start : start + ENCODE_BATCH]
            rows_BT, lengths_B = pad([histories[user] for user in part], self.max_history)
            lengths = torch.from_numpy(lengths_B)
            states_BTE = self(torch.from_numpy(np.asarray(items_NE[rows_BT])), lengths)
            users_BE[part] = states_BTE[torch.arange(len(part)), lengths - 1].numpy()
        self.train(training)
        return users_BE


class _Block(nn.Module):
    """Causal self-attention, then a position-wise feed-forward net; each normalised before and added after."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states_BTE: torch.Tensor) -> torch.Tensor:
        states_BTE = states_BTE + self.dropout(self._attend(self.attention_norm(states_BTE)))
        added_BTE: torch.Tensor = states_BTE + self.dropout(self.feed(self.feed_norm(states_BTE)))
        return added_BTE

    def _attend(self, states_BTE: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(states_BTE), *self.key_value(states_BTE).chunk(2, dim=-1))
        )
        mixed_BHTE = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out_BTE: torch.Tensor = self.out(mixed_BHTE.transpose(1, 2).flatten(2))
        return out_BTE


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
