"""Whitening of pooled states, so that one readout fits any language model (METHOD.md, section 3; ours).

The states of a language model share a long mean, and what tells texts apart is small in them. So each side's are moved
to their mean and stretched by the inverse root of their covariance, as whitened sentence embeddings are (Su et al.,
arXiv 2103.15316). Users and items have each their own mean and covariance, but the same directions.

Shape letters: N texts, D hidden size, Z directions read.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SHRINK = 0.1
"""Of the mean variance, added to that of every direction before it is stretched: directions in which next to nothing
varies stay short. On validation users .03, .1 and .3 did alike (RESULTS.md)."""
NOISE = 1e-5
"""Of the states' mean square, added to the variance of every direction: where all texts are one, as of a prompt without
a field, rounding is not stretched into something."""


class Whitening(NamedTuple):
    """White states are `(states - center_D) @ map_ZD.T`, of length 1 in the mean square."""

    center_D: Tensor
    map_ZD: Tensor


def whiten(users_ND: Tensor, items_ND: Tensor, size: int) -> tuple[Whitening, Whitening]:
    """What whitens each side's states, in at most `size` directions: those in which both vary most."""
    users_DD, items_DD = _covariance(users_ND), _covariance(items_ND)
    directions_ZD = _directions(users_DD / users_DD.trace() + items_DD / items_DD.trace(), size)
    return _whitening(users_ND, users_DD, directions_ZD), _whitening(items_ND, items_DD, directions_ZD)


def _covariance(states_ND: Tensor) -> Tensor:
    states_ND = states_ND.double()
    covariance_DD = torch.cov(states_ND.T, correction=0)
    covariance_DD.diagonal().add_(NOISE * states_ND.square().mean())
    return covariance_DD


def _directions(covariance_DD: Tensor, size: int) -> Tensor:
    """Where it is largest, (Z, D); all, as they are, of a narrow model."""
    if size >= len(covariance_DD):
        return torch.eye(len(covariance_DD), dtype=covariance_DD.dtype)
    vectors_DD: Tensor = torch.linalg.eigh(covariance_DD).eigenvectors
    return vectors_DD[:, -size:].T


def _whitening(states_ND: Tensor, covariance_DD: Tensor, directions_ZD: Tensor) -> Whitening:
    variances_Z, vectors_ZZ = torch.linalg.eigh(directions_ZD @ covariance_DD @ directions_ZD.T)
    variances_Z = variances_Z.clamp_min(0)
    stretch_Z = (variances_Z + SHRINK * variances_Z.mean()).rsqrt()
    stretch_Z /= (stretch_Z.square() * variances_Z).sum().sqrt()
    map_ZD = vectors_ZZ @ torch.diag(stretch_Z) @ vectors_ZZ.T @ directions_ZD
    return Whitening(states_ND.double().mean(0).float(), map_ZD.float())
