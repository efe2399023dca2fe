"""EASE: the linear item-item model in closed form (Steck, WWW 2019).

B minimises |X - X B|^2 + penalty |B|^2 with a diagonal of zeros, where X has a 1 for each user and item of the training
interactions. With P = (X'X + penalty I)^-1 it is B = -P / diag(P), column by column, off the diagonal.

Shape letters: U users, N catalogue, M neighbours kept.
"""

from collections.abc import Iterator

import numpy as np
from scipy import sparse
from scipy.linalg import lapack

from rarec.config.neighbours import NeighbourConfig
from rarec.data.dataset import PreparedDataset
from rarec.neighbours.base import NeighbourModel, matrix_of, nearest

ROWS = 256
"""Rows of the matrix of pairs that are counted at a time."""


class Ease(NeighbourModel):
    """EASE: an item's neighbours are the M items that it speaks for most.

    Memory is that of two dense matrices of N x N, and some rows of one.
    """

    class Config(NeighbourConfig):
        """See `Neighbours`."""

        ease_penalty: float
        ease_items: int

    title = "EASE"
    limit = "ease_items"
    config: Config

    def fit(self, dataset: PreparedDataset) -> sparse.csr_matrix:
        """See `NeighbourModel`."""
        n_items = dataset.n_items
        gram_NN = np.zeros((n_items, n_items))
        for seen_uN in training_matrices(dataset):
            by_item_uN = seen_uN.tocsc()
            for start in range(0, n_items, ROWS):
                gram_NN[start : start + ROWS] += (by_item_uN[:, start : start + ROWS].T @ seen_uN).toarray()
        gram_NN[np.diag_indices_from(gram_NN)] += self.config.ease_penalty
        factor_NN, _ = lapack.dpotrf(gram_NN, lower=1, overwrite_a=1)  # X'X + penalty I is positive definite
        inverse_NN, _ = lapack.dpotri(factor_NN, lower=1, overwrite_c=1)  # its lower half
        diagonal_N = inverse_NN.diagonal().copy()
        items_N = np.arange(n_items)
        rows = (np.concatenate([inverse_NN[row, :row], inverse_NN[row:, row]]) for row in items_N)
        scores = ((-own_N / diagonal_N).astype(np.float32) for own_N in rows)
        return matrix_of((nearest(row, items_N, own_N, self.config.top) for row, own_N in enumerate(scores)), n_items)


def training_matrices(dataset: PreparedDataset) -> Iterator[sparse.csr_matrix]:
    """Yield a 1 for each user and item of the training interactions, (u, N), some users at a time."""
    for users, items_i in dataset.training_items():
        lengths_u = dataset.train_length_U[users]
        of_i = np.repeat(np.arange(len(lengths_u)), lengths_u)
        seen_uN = sparse.csr_matrix((np.ones(len(items_i)), (of_i, items_i)), (len(lengths_u), dataset.n_items))
        seen_uN.data[:] = 1  # an item that a user has twice
        yield seen_uN
