"""Whitening of what is read, so that one readout fits any language model (METHOD.md, section 3; ours).

The states of a language model share a long mean, and what tells texts apart is small in them. So they are moved to
their mean and stretched by the inverse root of their covariance, as whitened sentence embeddings are (Su et al.,
arXiv 2103.15316). Every part of a readout has its own mean and covariance on each side, and all have the same
directions.

Shape letters: B of a batch, D hidden size, Z directions read.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

SHRINK = 0.1
"""Of the mean variance, added to that of every direction before it is stretched: directions in which next to nothing
varies stay short. On validation users .03, .1 and .3 did alike (RESULTS.md)."""
NOISE = 1e-5
"""Of the states' mean square, added to the variance of every direction: where all are one, as of a prompt without a
field, rounding is not stretched into something."""

Sums = npt.NDArray[np.float64]


class Whitening(nn.Module):
    """White states are `(states - center_D) @ map_ZD.T`, of length 1 in the mean square; at first as they are."""

    center_D: Tensor
    map_ZD: Tensor

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.register_buffer("center_D", torch.zeros(hidden))
        self.register_buffer("map_ZD", torch.eye(size, hidden))

    def forward(self, states_BD: Tensor) -> Tensor:
        """States (B, D) as white ones (B, Z)."""
        return (states_BD - self.center_D) @ self.map_ZD.T

    def fit(self, moments: "Moments", directions_ZD: Tensor) -> None:
        """Take the mean and the covariance of these states; where there were none, all stays."""
        if moments.count:
            variances_Z, vectors_ZZ = torch.linalg.eigh(directions_ZD @ moments.covariance_DD @ directions_ZD.T)
            variances_Z = variances_Z.clamp_min(0)
            stretch_Z = (variances_Z + SHRINK * variances_Z.mean()).rsqrt()
            stretch_Z /= (stretch_Z.square() * variances_Z).sum().sqrt()
            self.center_D.copy_(moments.mean_D)
            self.map_ZD.copy_(vectors_ZZ @ torch.diag(stretch_Z) @ vectors_ZZ.T @ directions_ZD)


class Moments:
    """Sums over states: of 1, of each, of its outer product with itself. Those of several ranks add up."""

    def __init__(self, hidden: int) -> None:
        self.sums: Sums = np.zeros((hidden + 1, hidden + 1))

    def add(self, states_BD: Tensor) -> None:
        """These states, too."""
        states = states_BD.double().cpu().numpy()
        padded = np.concatenate([states, np.ones((len(states), 1))], 1)
        self.sums += padded.T @ padded

    @property
    def count(self) -> int:
        """Of the states."""
        return round(float(self.sums[-1, -1]))

    @property
    def mean_D(self) -> Tensor:
        """Of the states."""
        return torch.from_numpy(self.sums[-1, :-1] / self.count)

    @property
    def covariance_DD(self) -> Tensor:
        """Of the states, noise included."""
        squares_DD = torch.from_numpy(self.sums[:-1, :-1] / self.count)
        covariance_DD = squares_DD - torch.outer(self.mean_D, self.mean_D)
        covariance_DD.diagonal().add_(NOISE * squares_DD.diagonal().mean() + torch.finfo().tiny)
        return covariance_DD


def directions(moments: Mapping[str, Moments], hidden: int, size: int) -> Tensor:
    """In which all vary most, each as much as the others (Z, D), float64; of a narrow model all, as they are."""
    if size >= hidden:
        return torch.eye(hidden, dtype=torch.float64)
    found = [of.covariance_DD for of in moments.values() if of.count]
    vectors_DD: Tensor = torch.linalg.eigh(sum(c / c.trace() for c in found)).eigenvectors
    return vectors_DD[:, -size:].T
