"""Negatives from the catalogue: which they are, and their vectors as the model has them now (ours).

Shape letters: M negatives, N catalogue, Z size of a scored vector.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rarec.config.schema import Loss
from rarec.models.objective import Negatives

Encode = Callable[[npt.NDArray[np.integer]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Catalogue:
    """Draws negatives and encodes them.

    Attributes:
        config: the section `loss`.
        seed: with the step, it determines the draw.
        items: N.
        encode: item vectors (M, Z) of these rows, without dropout; on every rank all of them.
        device: of the negatives.
    """

    config: Loss
    seed: int
    items: int
    encode: Encode
    device: torch.device

    def negatives(self, step: int) -> Negatives | None:
        """Those of the steps that follow; None where the batch is all."""
        if not self.config.negatives:
            return None
        rows_M = np.arange(self.items)
        if self.config.negatives < self.items:
            rng = np.random.default_rng([self.seed, step, *b"negatives"])
            rows_M = np.sort(rng.choice(self.items, self.config.negatives, replace=False))
        vectors_MZ = torch.from_numpy(self.encode(rows_M)).to(self.device)
        return Negatives(torch.from_numpy(rows_M).to(self.device), vectors_MZ, self.items)
