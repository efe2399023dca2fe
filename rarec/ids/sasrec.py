"""SASRec (Kang & McAuley 2018, "Self-Attentive Sequential Recommendation"), in plain torch.

Shape letters: B sequences, T positions, E dimension, H attention heads.
"""

import torch
from torch import nn
from torch.nn import functional

from rarec.errors import UserError
from rarec.ids.sequence import SequenceModel


class SasRec(SequenceModel):
    """Self-attention over the sequence; one state a position. Inputs and scores share the item table (section 3.4).

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
        """See `SequenceModel`.

        Positions count back from the newest item, so the state that recommends always stands at the same one.
        """
        steps_T = torch.arange(items_BTE.shape[1])
        position_BT = (self.max_history - lengths_B[:, None] + steps_T).clamp(max=self.max_history - 1)
        states_BTE = items_BTE * items_BTE.shape[-1] ** 0.5 + self.positions(position_BT)
        states_BTE = self.dropout(states_BTE)
        for block in self.blocks:
            states_BTE = block(states_BTE)
        normed_BTE: torch.Tensor = self.norm(states_BTE)
        return normed_BTE.unsqueeze(2)


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
