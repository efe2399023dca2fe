"""Whitening of what is read, so that one readout fits any language model (METHOD.md, section 3; ours).

The states of a language model share a long mean, and what tells texts apart is small in them. So they are moved to
their mean and stretched by the inverse root of their covariance, as whitened sentence embeddings are (Su et al.,
arXiv 2103.15316). Every part of a readout has its own mean and covariance on each side, and all have the same
directions. Of few states a covariance is mixed with that of a ball, the more the fewer they are (OAS: Chen et al.,
arXiv 0907.4698), so that unseen states come out no longer than those seen.

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
FLAT = 1e-5
"""Of the states' mean square: where less than this varies all are one, as of a prompt without a field, and rounding is
not stretched into something."""

Sums = npt.NDArray[np.float64]


class Whitening(nn.Module):
    """White states are `(states - center_D) @ directions_ZD.T @ stretch_ZZ`, of length 1 in the mean square.

    Directions are the readout's, since a map of each part (Z, D) would be most of a bundle. At first nothing is moved.
    """

    center_D: Tensor
    stretch_ZZ: Tensor

    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.register_buffer("center_D", torch.zeros(hidden))
        self.register_buffer("stretch_ZZ", torch.eye(size))

    def forward(self, states_BD: Tensor, directions_ZD: Tensor | None) -> Tensor:
        """States (B, D) as white ones (B, Z); without directions in all of the model's own."""
        moved_BD = states_BD - self.center_D
        return (moved_BD if directions_ZD is None else moved_BD @ directions_ZD.T) @ self.stretch_ZZ

    @property
    def unit(self) -> Tensor | None:
        """Of states: a random step of this length in each dimension is, whitened, one of length 1 in the mean square.

        None of what is read as zero.
        """
        length = self.stretch_ZZ.norm()
        return 1 / length if length > 0 else None

    def fit(self, moments: "Moments", directions_ZD: Tensor) -> None:
        """Take the mean and the covariance of these states.

        A part that none has, or that is one in all, tells nothing, and is read as zero from then on.
        """
        if moments.flat:
            self.stretch_ZZ.zero_()
            return
        found_Z, vectors_ZZ = torch.linalg.eigh(directions_ZD @ moments.covariance_DD @ directions_ZD.T)
        variances_Z = estimated(found_Z.clamp_min(0), moments.count)
        stretch_Z = (variances_Z + SHRINK * variances_Z.mean()).rsqrt()
        stretch_Z /= (stretch_Z.square() * variances_Z).sum().sqrt()
        self.center_D.copy_(moments.mean_D)
        self.stretch_ZZ.copy_(vectors_ZZ @ torch.diag(stretch_Z) @ vectors_ZZ.T)


def estimated(found_Z: Tensor, count: int) -> Tensor:
    """The variances of all states, given those found in so many (Z,): OAS."""
    size, total, squares = len(found_Z), found_Z.sum(), found_Z.square().sum()
    uneven = (count + 1 - 2 / size) * (squares - total.square() / size)
    share = (((1 - 2 / size) * squares + total.square()) / uneven).clamp(max=1) if uneven > 0 else 1.0
    return (1 - share) * found_Z + share * found_Z.mean()


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
        """Of the states."""
        squares_DD = torch.from_numpy(self.sums[:-1, :-1] / self.count)
        return squares_DD - torch.outer(self.mean_D, self.mean_D)

    @property
    def flat(self) -> bool:
        """Whether there are none, or all are one."""
        squares = self.sums.diagonal()[:-1].sum()
        return not self.count or float(self.covariance_DD.trace()) <= FLAT * squares / self.count


def directions(moments: Mapping[str, Moments], hidden: int, size: int) -> Tensor:
    """In which all vary most, each as much as the others (Z, D), float64; of a narrow model all, as they are."""
    found = [of.covariance_DD for of in moments.values() if not of.flat]
    if size >= hidden or not found:
        return torch.eye(min(size, hidden), hidden, dtype=torch.float64)
    vectors_DD: Tensor = torch.linalg.eigh(sum(c / c.trace() for c in found)).eigenvectors
    return vectors_DD[:, -size:].T
