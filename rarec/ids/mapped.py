"""User vectors of another ID model, mapped into the space of the one that a recommender was trained with.

Shape letters: N items, B users, K vectors a user, E dimension of the target space, S dimension of the other model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from rarec.ids.source import UserVectors

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]
ITEMS, MATRIX, BIAS, INNER = "items", "matrix", "bias", "inner."
"""Names of its tensors; those of the other model's user vectors begin with the last."""


@dataclass(frozen=True)
class MappedUsers:
    """User vectors u M + b, where u are those of another ID model.

    Attributes:
        inner: makes the other model's user vectors.
        items_NS: the other model's item vectors, which it reads; zeros for items that it does not know.
        matrix_SE: M.
        bias_E: b.
    """

    inner: "UserVectors"
    items_NS: Floats
    matrix_SE: Floats
    bias_E: Floats

    @property
    def per_user(self) -> int:
        """K."""
        return self.inner.per_user

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The map, and what the other model is made by."""
        own = {ITEMS: self.items_NS, MATRIX: self.matrix_SE, BIAS: self.bias_E}
        inner = {INNER + name: tensor for name, tensor in self.inner.tensors.items()}
        return {**{name: torch.from_numpy(np.array(array)) for name, array in own.items()}, **inner}

    def vectors(self, items_NE: Floats, user_rows: Rows, histories: Sequence[Rows]) -> Floats:
        """See `UserVectors`. Items that the other model does not know are passed over; zeros without any other."""
        known = [history[(self.items_NS[history] != 0).any(-1)] for history in histories]
        users_BKS = self.inner.vectors(self.items_NS, user_rows, known)
        there_B11 = np.array([len(history) > 0 for history in known])[:, None, None]
        mapped_BKE: Floats = ((users_BKS @ self.matrix_SE + self.bias_E) * there_B11).astype(np.float32)
        return mapped_BKE

    def permuted(self, rng: np.random.Generator) -> "MappedUsers":
        """Return the user vectors of permuted items, a copy in memory."""
        return replace(self, items_NS=self.items_NS[rng.permutation(len(self.items_NS))])
