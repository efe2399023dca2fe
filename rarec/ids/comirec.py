"""ComiRec-SA (Cen et al. 2020, "Controllable Multi-Interest Framework for Recommendation"), in plain torch.

Shape letters: B sequences, T positions that recommend, S positions that are read, K interests, E dimension.
"""

import torch
from torch import nn

from rarec.ids.sequence import SequenceModel


class ComiRec(SequenceModel):
    """K interests, each a weighted mean of the items read so far, by self-attention (equations 5 and 6).

    An item's age is added to the logits of its weight, a learned number for each interest, so that every prefix of a
    sequence is one sample more (ours; the original adds a place in the padded sequence to the item's vector).

    Args:
        dim: E, of item vectors and interests.
        interests: K.
        hidden: size of the attention's hidden layer.
        max_history: the newest interactions that are read.
        dropout: on the item vectors.
    """

    def __init__(self, dim: int, interests: int, hidden: int, max_history: int, dropout: float) -> None:
        super().__init__()
        self.max_history, self.per_user = max_history, interests
        self.attention = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, interests, bias=False))
        self.ages = nn.Embedding(max_history, interests)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.ages.weight, std=0.02)

    def forward(self, items_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """See `SequenceModel`."""
        items_BSE = self.dropout(items_BTE)
        steps = torch.arange(items_BTE.shape[1])
        age_TS = steps[:, None] - steps[None, :]
        scale = items_BTE.shape[-1] ** 0.5
        logits_BTSK = self.attention(items_BSE * scale)[:, None] + self.ages(age_TS.clamp(min=0))
        weights_BTSK = logits_BTSK.masked_fill(age_TS[..., None] < 0, -torch.inf).softmax(2)
        return torch.einsum("btsk,bse->btke", weights_BTSK, items_BSE)
