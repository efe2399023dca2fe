"""GRU4Rec (Hidasi et al. 2016, "Session-based Recommendations with Recurrent Neural Networks"), in plain torch.

Shape letters: B sequences, T positions, E dimension.
"""

import torch
from torch import nn

from rarec.ids.sequence import SequenceModel


class Gru4Rec(SequenceModel):
    """A recurrent state over the sequence, mapped to the items' space; one state a position.

    Args:
        dim: E, of item vectors.
        hidden: size of the recurrent state.
        layers: recurrent layers.
        max_history: the newest interactions that are read.
        dropout: on the embeddings, between layers and on the state.
    """

    def __init__(self, dim: int, hidden: int, layers: int, max_history: int, dropout: float) -> None:
        super().__init__()
        self.max_history = max_history
        between = dropout if layers > 1 else 0.0
        self.gru = nn.GRU(dim, hidden, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, dim)

    def forward(self, items_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """See `SequenceModel`."""
        states_BTE, _ = self.gru(self.dropout(items_BTE * items_BTE.shape[-1] ** 0.5))
        mapped_BTE: torch.Tensor = self.out(self.dropout(states_BTE))
        return mapped_BTE.unsqueeze(2)
