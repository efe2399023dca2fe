"""Three ways from a user to vectors: a model that reads the history, a rule over it, or a table of users.

Shape letters: N items, U users, B users of a batch, K vectors a user, E dimension, T history.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file, save_file

from rarec.config.ids import Recipe
from rarec.ids.comirec import ComiRec
from rarec.ids.gru4rec import Gru4Rec
from rarec.ids.sasrec import SasRec
from rarec.ids.sequence import SequenceModel, pad

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]

USERS_FILE = "users.npy"
MODEL_FILE = "model.safetensors"


class UserVectors(Protocol):
    """How a source makes user vectors."""

    @property
    def per_user(self) -> int:
        """K."""

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """User vectors (B, K, E), of users given by row and by item rows of their history, oldest first."""

    def permuted(self, rng: np.random.Generator) -> "UserVectors":
        """The same way when item vectors are permuted; what is made from item vectors follows by itself."""


@dataclass(frozen=True)
class SequenceUsers:
    """The states after the last interaction of the history."""

    model: SequenceModel

    @property
    def per_user(self) -> int:
        """K."""
        return self.model.per_user

    @classmethod
    def open(cls, directory: Path, settings: Recipe) -> "SequenceUsers":
        """Read a trained model."""
        model = build(settings)
        model.load_state_dict(load_file(directory / MODEL_FILE))
        return cls(model.eval())

    def save(self, directory: Path) -> None:
        """Write the model; its item table is the source's own."""
        save_file(self.model.state_dict(), directory / MODEL_FILE)

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """Histories through the model, (B, K, E)."""
        return self.model.encode(items_NE, histories)

    def permuted(self, rng: np.random.Generator) -> "SequenceUsers":
        """Itself: it reads item vectors."""
        return self


MODELS: dict[str, type[SequenceModel]] = {"sasrec": SasRec, "gru4rec": Gru4Rec, "comirec": ComiRec}
"""Those that are trained here, by the name of their section."""


def build(settings: Recipe) -> SequenceModel:
    """A model of the configured shape, at its random start."""
    return MODELS[settings.kind](**settings.shape)


@dataclass(frozen=True)
class HistoryRule:
    """A weighted mean of the history's item vectors; the weight depends on age alone; K = 1.

    Attributes:
        weights_T: by age, the newest item first; older items than T are not read.
    """

    weights_T: npt.NDArray[np.float64]
    per_user: int = 1

    @classmethod
    def of(cls, rule: Literal["mean", "last", "recency"], half_life: float, max_history: int) -> "HistoryRule":
        """The configured rule: equal weights, the newest item alone, or weights that halve every `half_life` items."""
        age_T = np.arange(max_history)
        weights = {"mean": np.ones(max_history), "last": (age_T == 0) * 1.0, "recency": 0.5 ** (age_T / half_life)}
        return cls(weights[rule])

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """Weighted means (B, 1, E) of those that have a vector; a history without any gives the zero vector."""
        known = [history[(items_NE[history] != 0).any(-1)] for history in histories]
        rows_BT, lengths_B = pad(known, len(self.weights_T))
        age_BT = lengths_B[:, None] - 1 - np.arange(rows_BT.shape[1])
        weights_BT = np.where(age_BT >= 0, self.weights_T[age_BT], 0.0)
        weights_BT /= np.maximum(weights_BT.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        users_BE: npt.NDArray[np.float64] = np.einsum("bt,bte->be", weights_BT, items_NE[rows_BT])
        return users_BE[:, None].astype(np.float32)

    def permuted(self, rng: np.random.Generator) -> "HistoryRule":
        """Itself: it reads item vectors."""
        return self


@dataclass(frozen=True)
class UserTable:
    """Vectors made elsewhere, one row a user; the history is not read."""

    users_UKE: Floats

    @property
    def per_user(self) -> int:
        """K."""
        return int(self.users_UKE.shape[1])

    @classmethod
    def open(cls, directory: Path) -> "UserTable":
        """Memory-map the table, copy on write."""
        return cls(np.load(directory / USERS_FILE, mmap_mode="c", allow_pickle=False))

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """Rows of the table, (B, K, E)."""
        users_BKE: Floats = np.asarray(self.users_UKE[user_rows])
        return users_BKE

    def permuted(self, rng: np.random.Generator) -> "UserTable":
        """Rows permuted among users; a copy in memory."""
        return UserTable(self.users_UKE[rng.permutation(len(self.users_UKE))])
