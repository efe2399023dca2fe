"""EASE: the linear item-item model in closed form (Steck, WWW 2019).

B minimises |X - X B|^2 + penalty |B|^2 with a diagonal of zeros, where X has a 1 for each user and item of the training
interactions. With P = (X'X + penalty I)^-1 it is B = -P / diag(P), column by column, off the diagonal.

Shape letters: U users, N catalogue, M neighbours kept.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse
from scipy.linalg import lapack

from rarec.data.dataset import PreparedDataset
from rarec.neighbours.table import nearest


def ease(seen_UN: sparse.csr_matrix, penalty: float, top: int) -> Iterator[pa.RecordBatch]:
    """Yield the neighbour table of the M items that each item speaks for most.

    Memory is that of two dense matrices of N x N.

    Args:
        seen_UN: 1 where the user has the item.
        penalty: on squared weights; relative to the number of users of an item.
        top: M.
    """
    gram_NN = (seen_UN.T @ seen_UN).toarray().astype(np.float64)
    gram_NN[np.diag_indices_from(gram_NN)] += penalty
    factor_NN, _ = lapack.dpotrf(gram_NN, lower=1, overwrite_a=1)  # X'X + penalty I is positive definite
    inverse_NN, _ = lapack.dpotri(factor_NN, lower=1, overwrite_c=1)  # its lower half
    diagonal_N = inverse_NN.diagonal().copy()
    for row in range(len(diagonal_N)):
        own_N = np.concatenate([inverse_NN[row, :row], inverse_NN[row:, row]])
        yield nearest(row, (-own_N / diagonal_N).astype(np.float32), top)


def training_matrix(dataset: PreparedDataset) -> sparse.csr_matrix:
    """Return a 1 for each user and item of the training interactions, (U, N)."""
    users_U, lengths_U = np.arange(len(dataset.train_length_U)), dataset.train_length_U
    trains_I = np.arange(len(dataset.item_rows_I)) < np.repeat(dataset.starts_U + lengths_U, dataset.lengths_U)
    rows_I: npt.NDArray[np.int32] = dataset.item_rows_I[trains_I]
    shape = (len(users_U), dataset.n_items)
    seen_UN = sparse.csr_matrix((np.ones(len(rows_I)), (np.repeat(users_U, lengths_U), rows_I)), shape)
    seen_UN.data[:] = 1  # an item that a user has twice
    return seen_UN
