"""EASE: the linear item-item model in closed form (Steck, WWW 2019).

B minimises |X - X B|^2 + penalty |B|^2 with a diagonal of zeros, where X has a 1 for each user and item of the training
interactions. With P = (X'X + penalty I)^-1 it is B = -P / diag(P), column by column, off the diagonal.

Shape letters: U users, N catalogue, M neighbours kept.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from scipy import sparse
from scipy.linalg import lapack

from rarec.data.dataset import PreparedDataset
from rarec.neighbours.table import nearest

ROWS = 256
"""Rows of the matrix of pairs that are counted at a time."""


def ease(seen: Iterable[sparse.csr_matrix], n_items: int, penalty: float, top: int) -> Iterator[pa.RecordBatch]:
    """Yield the neighbour table of the M items that each item speaks for most.

    Memory is that of two dense matrices of N x N, and some rows of one.

    Args:
        seen: 1 where a user has the item, (u, N), some users at a time.
        n_items: N.
        penalty: on squared weights; relative to the number of users of an item.
        top: M.
    """
    gram_NN = np.zeros((n_items, n_items))
    for seen_uN in seen:
        by_item_uN = seen_uN.tocsc()
        for start in range(0, n_items, ROWS):
            gram_NN[start : start + ROWS] += (by_item_uN[:, start : start + ROWS].T @ seen_uN).toarray()
    gram_NN[np.diag_indices_from(gram_NN)] += penalty
    factor_NN, _ = lapack.dpotrf(gram_NN, lower=1, overwrite_a=1)  # X'X + penalty I is positive definite
    inverse_NN, _ = lapack.dpotri(factor_NN, lower=1, overwrite_c=1)  # its lower half
    diagonal_N = inverse_NN.diagonal().copy()
    for row in range(len(diagonal_N)):
        own_N = np.concatenate([inverse_NN[row, :row], inverse_NN[row:, row]])
        yield nearest(row, (-own_N / diagonal_N).astype(np.float32), top)


def training_matrices(dataset: PreparedDataset) -> Iterator[sparse.csr_matrix]:
    """Yield a 1 for each user and item of the training interactions, (u, N), some users at a time."""
    for users, items_i in dataset.training_items():
        lengths_u = dataset.train_length_U[users]
        of_i = np.repeat(np.arange(len(lengths_u)), lengths_u)
        seen_uN = sparse.csr_matrix((np.ones(len(items_i)), (of_i, items_i)), (len(lengths_u), dataset.n_items))
        seen_uN.data[:] = 1  # an item that a user has twice
        yield seen_uN
