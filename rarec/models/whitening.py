"""Whitening of the states that are read out, so that one readout fits any language model (docs/method.md, 3 [D]).

The states of a language model share a long mean, and the differences between texts are small beside it. So their mean
is subtracted, and they are multiplied by the inverse root of their covariance, as in whitened sentence embeddings (Su
et al., arXiv 2103.15316). Every part of a readout has its own mean and covariance on each side; the directions are
common to all. A covariance of few states is shrunk towards a multiple of the identity (OAS: Chen et al., arXiv
0907.4698), so that unseen states are not longer than seen ones after whitening.

Shape letters: B of a batch, D hidden size, Z directions read.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

SHRINK = 0.1
"""Share of the mean variance that is added to the variance of every direction before its root is inverted, so that
directions with next to no variance stay short. On validation users .03, .1 and .3 gave the same (RESULTS.md)."""
CONSTANT_SHARE = 1e-5
"""States whose variance is below this share of their mean square count as constant, as those of a prompt without any
field; otherwise rounding errors would be amplified."""

Sums = npt.NDArray[np.float64]


class Whitening(nn.Module):
    """Computes `(states - center_D) @ directions_ZD.T @ stretch_ZZ`, whose mean squared length is 1.

    The directions belong to the readout: a map (Z, D) for each part would be most of a bundle. Before `fit`, the map is
    the identity.
    """

    center_D: Tensor
    stretch_ZZ: Tensor

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.register_buffer("center_D", torch.zeros(hidden))
        self.register_buffer("stretch_ZZ", torch.eye(size))

    def forward(self, states_BD: Tensor, directions_ZD: Tensor | None) -> Tensor:
        """Whiten states (B, D) to (B, Z); None as directions reads all D dimensions."""
        moved_BD = states_BD - self.center_D
        return (moved_BD if directions_ZD is None else moved_BD @ directions_ZD.T) @ self.stretch_ZZ

    @property
    def unit(self) -> Tensor | None:
        """The standard deviation of a random step in each dimension whose whitened mean squared length is 1.

        None if the part is constant, and so read as zero.
        """
        length = self.stretch_ZZ.norm()
        return 1 / length if length > 0 else None

    def fit(self, moments: "Moments", directions_ZD: Tensor) -> None:
        """Fit mean and stretch to the moments of states.

        A part that is missing or constant in all of them holds no information, and is read as zero from then on.
        """
        if moments.constant:
            self.stretch_ZZ.zero_()
            return
        values_Z, vectors_ZZ = torch.linalg.eigh(directions_ZD @ moments.covariance_DD @ directions_ZD.T)
        variances_Z = shrunk(values_Z.clamp_min(0), moments.count)
        stretch_Z = (variances_Z + SHRINK * variances_Z.mean()).rsqrt()
        stretch_Z /= (stretch_Z.square() * variances_Z).sum().sqrt()
        self.center_D.copy_(moments.mean_D)
        self.stretch_ZZ.copy_(vectors_ZZ @ torch.diag(stretch_Z) @ vectors_ZZ.T)


def shrunk(variances_Z: Tensor, count: int) -> Tensor:
    """Return the OAS estimate of variances (Z,), given those of a sample of `count` states."""
    size, total, squares = len(variances_Z), variances_Z.sum(), variances_Z.square().sum()
    uneven = (count + 1 - 2 / size) * (squares - total.square() / size)
    share = (((1 - 2 / size) * squares + total.square()) / uneven).clamp(max=1) if uneven > 0 else 1.0
    return (1 - share) * variances_Z + share * variances_Z.mean()


class Moments:
    """Sums over states, of 1, the state, and its outer product with itself; the sums of several ranks add up."""

    def __init__(self, hidden: int) -> None:
        self.sums: Sums = np.zeros((hidden + 1, hidden + 1))

    def add(self, states_BD: Tensor) -> None:
        """Add states."""
        states = states_BD.double().cpu().numpy()
        padded = np.concatenate([states, np.ones((len(states), 1))], 1)
        self.sums += padded.T @ padded

    @property
    def count(self) -> int:
        """The number of states."""
        return round(float(self.sums[-1, -1]))

    @property
    def mean_D(self) -> Tensor:
        """The mean of the states."""
        return torch.from_numpy(self.sums[-1, :-1] / self.count)

    @property
    def covariance_DD(self) -> Tensor:
        """The covariance of the states."""
        squares_DD = torch.from_numpy(self.sums[:-1, :-1] / self.count)
        return squares_DD - torch.outer(self.mean_D, self.mean_D)

    @property
    def constant(self) -> bool:
        """Return whether there are no states, or all are equal."""
        squares = self.sums.diagonal()[:-1].sum()
        return not self.count or float(self.covariance_DD.trace()) <= CONSTANT_SHARE * squares / self.count


def directions(moments: Iterable[Moments], hidden: int, size: int) -> Tensor:
    """Return the directions (Z, D) of largest variance, float64, with equal weight of each part; all if `size` >= D."""
    covariances = [part.covariance_DD for part in moments if not part.constant]
    if size >= hidden or not covariances:
        return torch.eye(min(size, hidden), hidden, dtype=torch.float64)
    vectors_DD: Tensor = torch.linalg.eigh(sum(c / c.trace() for c in covariances)).eigenvectors
    return vectors_DD[:, -size:].T
