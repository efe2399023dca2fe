"""The ID models that are trained here: SASRec, GRU4Rec and ComiRec, in plain PyTorch.

Shape letters: B sequences, T positions that recommend, S positions that are read, K states of a position, E dimension,
H attention heads, N catalogue.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from inspect import signature
from typing import ClassVar, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import create_model
from torch import nn
from torch.nn import functional

from rarec.config.ids import ComiRecConfig, Gru4RecConfig, Recipe, SasRecConfig
from rarec.errors import UserError

ENCODE_BATCH = 1024
"""Histories encoded at a time: memory does not depend on their number."""

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]


class SequenceModel(nn.Module, ABC):
    """Base class of ID models: item vectors in order -> K states after each position.

    The score of item i is the largest (state) . e_i, without a bias. A subclass implements `forward`, and may have

    - a `Config`, a subclass of `Recipe`: its fields are the model's settings in the YAML, and their defaults;
    - a constructor that takes `dim`, `max_history`, `dropout` and the fields of its `Config` as keyword arguments.

    The item table is not part of the module: inputs and scores share it, the artefact stores it as a file of its own
    for readers of item vectors, and the sanity check `permuted_ids` replaces it. rarec trains both together.

    Args:
        max_history: number of newest interactions that are read.
        per_user: K; the same as `Config.per_user`.
    """

    Config: ClassVar[type[Recipe]] = Recipe

    def __init__(self, max_history: int, per_user: int = 1) -> None:
        super().__init__()
        self.max_history, self.per_user = max_history, per_user

    def __init_subclass__(cls) -> None:
        """Bind the class and its `Config` to each other.

        Raises:
            TypeError: the `Config` belongs to another model, or has a field `kind`.
        """
        super().__init_subclass__()
        if "Config" not in cls.__dict__:
            cls.Config = create_model("Config", __base__=cls.Config)
        config = cls.Config
        own = config.__dict__
        other = own.get("builds", cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__name__}.Config is that of {other.__name__}: give it a subclass")
        if "kind" in config.model_fields:
            raise TypeError(f"{cls.__name__}.Config: a setting cannot be called `kind`")
        config.builds = cls
        config.title = own.get("title", cls.__name__)

    @abstractmethod
    def forward(self, items_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Return the states after each position, (B, T, K, E); none may depend on a later item.

        State t is trained to score item t + 1 above others, so a state that sees later items learns nothing of use.

        Args:
            items_BTE: item vectors, oldest first, padded on the right: a causal state never sees the padding.
            lengths_B: number of real positions of each sequence.
        """

    @torch.no_grad()
    def encode(self, items_NE: Floats, histories: Sequence[Rows]) -> Floats:
        """Return the states after the last interaction of each history, (B, K, E), without dropout.

        Args:
            items_NE: the item table, in memory or memory-mapped.
            histories: item rows, oldest first; only the newest `max_history` are read. An empty history gives zero
                vectors, which score all items the same.
        """
        users_BKE = np.zeros((len(histories), self.per_user, items_NE.shape[1]), dtype=np.float32)
        known = np.flatnonzero([len(history) > 0 for history in histories])
        was_training = self.training
        self.eval()
        device = next((weight.device for weight in self.parameters()), None)  # a model of the user's own may have none
        for start in range(0, len(known), ENCODE_BATCH):
            part = known[start : start + ENCODE_BATCH]
            rows_BT, lengths = pad([histories[user] for user in part], self.max_history)
            lengths_B = torch.from_numpy(lengths).to(device)
            states_BTKE = self(torch.from_numpy(np.asarray(items_NE[rows_BT])).to(device), lengths_B)
            place_B = torch.arange(len(part), device=lengths_B.device)
            users_BKE[part] = states_BTKE[place_B, lengths_B - 1].numpy(force=True)
        self.train(was_training)
        return users_BKE


class SASRec(SequenceModel):
    """SASRec (Kang & McAuley 2018, "Self-Attentive Sequential Recommendation"): self-attention; one state a position.

    Args:
        dim: E, of item vectors and states.
        blocks: number of self-attention blocks.
        heads: number of attention heads; must divide `dim`.
        max_history: number of newest interactions that are read.
        dropout: on the embeddings and on the output of each sub-layer.

    Raises:
        UserError: `heads` does not divide `dim`.
    """

    Config = SasRecConfig

    def __init__(self, dim: int, blocks: int, heads: int, max_history: int, dropout: float) -> None:
        super().__init__(max_history)
        if dim % heads:
            problem = f"ids.sasrec.heads: {heads} heads do not divide ids.sasrec.dim: {dim}"
            raise UserError(problem, "set ids.sasrec.heads to a divisor of ids.sasrec.dim")
        self.positions = nn.Embedding(max_history, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_SASRecBlock(dim, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, items_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """See `SequenceModel`. Positions count back from the newest item, so it always has the same embedding."""
        steps_T = torch.arange(items_BTE.shape[1], device=items_BTE.device)
        position_BT = (self.max_history - lengths_B[:, None] + steps_T).clamp(max=self.max_history - 1)
        states_BTE = items_BTE * items_BTE.shape[-1] ** 0.5 + self.positions(position_BT)
        states_BTE = self.dropout(states_BTE)
        for block in self.blocks:
            states_BTE = block(states_BTE)
        normed_BTE: torch.Tensor = self.norm(states_BTE)
        return normed_BTE.unsqueeze(2)


class _SASRecBlock(nn.Module):
    """Causal self-attention, then a position-wise feed-forward net; each with pre-norm and a residual connection."""

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


class GRU4Rec(SequenceModel):
    """GRU4Rec (Hidasi et al. 2016, "Session-based Recommendations with Recurrent Neural Networks").

    The recurrent state is mapped to the items' space; one state a position.

    Args:
        dim: E, of item vectors.
        hidden: size of the recurrent state.
        layers: number of recurrent layers.
        max_history: number of newest interactions that are read.
        dropout: on the embeddings, between layers and on the state.
    """

    Config = Gru4RecConfig

    def __init__(self, dim: int, hidden: int, layers: int, max_history: int, dropout: float) -> None:
        super().__init__(max_history)
        between = dropout if layers > 1 else 0.0
        self.gru = nn.GRU(dim, hidden, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, dim)

    def forward(self, items_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """See `SequenceModel`."""
        states_BTE, _ = self.gru(self.dropout(items_BTE * items_BTE.shape[-1] ** 0.5))
        mapped_BTE: torch.Tensor = self.out(self.dropout(states_BTE))
        return mapped_BTE.unsqueeze(2)


class ComiRec(SequenceModel):
    """ComiRec-SA (Cen et al. 2020, "Controllable Multi-Interest Framework for Recommendation").

    Each of K interests is a weighted mean of the items read so far, by self-attention (equations 5 and 6). A learned
    number for each interest and item age is added to the logits of the weights, so that every prefix of a sequence is a
    sample of its own (our choice; the original adds an embedding of the position in the padded sequence to the item
    vector).

    Args:
        dim: E, of item vectors and interests.
        interests: K.
        hidden: size of the attention's hidden layer.
        max_history: number of newest interactions that are read.
        dropout: on the item vectors.
    """

    Config = ComiRecConfig

    def __init__(self, dim: int, interests: int, hidden: int, max_history: int, dropout: float) -> None:
        super().__init__(max_history, interests)
        self.attention = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, interests, bias=False))
        self.ages = nn.Embedding(max_history, interests)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.ages.weight, std=0.02)

    def forward(self, items_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """See `SequenceModel`."""
        items_BSE = self.dropout(items_BTE)
        steps = torch.arange(items_BTE.shape[1], device=items_BTE.device)
        age_TS = steps[:, None] - steps[None, :]
        scale = items_BTE.shape[-1] ** 0.5
        logits_BTSK = self.attention(items_BSE * scale)[:, None] + self.ages(age_TS.clamp(min=0))
        weights_BTSK = logits_BTSK.masked_fill(age_TS[..., None] < 0, -torch.inf).softmax(2)
        return torch.einsum("btsk,bse->btke", weights_BTSK, items_BSE)


def build(settings: Recipe) -> SequenceModel:
    """Build the model that settings belong to, with random weights.

    Raises:
        UserError: the constructor of a model of the user's own does not take its settings, or its K is not theirs.
    """
    made_by = settings.builds
    name = f"{made_by.__module__}.{made_by.__qualname__}"
    remedy = "see docs/extend.md, An ID model"
    try:
        signature(made_by).bind(**settings.shape)
    except TypeError as error:
        problem = f"field `ids.model`: {name} cannot be built with {', '.join(settings.shape)}: {error}"
        raise UserError(problem, f"let its constructor take these as keyword arguments: {remedy}") from None
    model = cast(SequenceModel, made_by(**settings.shape))
    if model.per_user != settings.per_user:
        problem = f"field `ids.model`: {name} has per_user {model.per_user}, and its Config {settings.per_user}"
        raise UserError(problem, f"return the same number from both: {remedy}")
    return model


def pad(histories: Sequence[Rows], max_history: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pad the newest `max_history` rows of each history on the right with row 0.

    Returns:
        Rows (B, T), T the longest history, and their lengths (B,).
    """
    newest = [history[-max_history:] for history in histories]
    lengths_B = np.array([len(history) for history in newest], dtype=np.int64)
    rows_BT = np.zeros((len(newest), lengths_B.max(initial=0)), dtype=np.int64)
    if newest:
        rows_BT[np.arange(rows_BT.shape[1]) < lengths_B[:, None]] = np.concatenate(newest)
    return rows_BT, lengths_B
