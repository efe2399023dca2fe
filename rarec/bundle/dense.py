"""A fusion as one table of item vectors, what any vector index takes, and the neighbours that are added to it.

The score of a user and an item is the inner product of their vectors here, plus that of the neighbour models, which is
not zero for the few items alone that they list. So the exact best k are among the best k + seen + listed of the table
and the listed items.

Shape letters: B users, C users of a block, N catalogue, F size of the fused vectors, K vectors of a user.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix

from rarec.errors import UserError
from rarec.neighbours.ranker import NeighbourRanker
from rarec.ranking import FusedRanker, Ranker, VectorRanker
from rarec.ranking.rank import VectorScores

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
_OTHER_ROW = "export a row with a variant: VARIANT+id"


@dataclass(frozen=True)
class DenseForm:
    """A fusion's dense parts as one inner product, and its sparse ones.

    Attributes:
        items_NF: item vectors: those of each dense part times its weight, side by side.
        dense: the dense parts by name, whose user vectors side by side are the user's.
        sparse: the neighbour models by name, with their weights.
    """

    items_NF: Float32
    dense: Mapping[str, VectorRanker]
    sparse: Mapping[str, tuple[NeighbourRanker, float]]

    @classmethod
    def of(cls, ranker: Ranker, names: Sequence[str]) -> "DenseForm":
        """Return the form of a fusion, or of a single model, whose parts have these names.

        Where a part lacks an item, the score that is predicted from the first part's goes into the item's vector of the
        first part, or into its column of the first part's table.

        Raises:
            UserError: no part is dense; or what an item's neighbours say would lower its score.
        """
        fusion = ranker if isinstance(ranker, FusedRanker) else FusedRanker((ranker,), (1.0,), (0.0,))
        named = dict(zip(names, zip(fusion.parts, fusion.weights, strict=True), strict=True))
        dense = {name: part for name, (part, _) in named.items() if isinstance(part, VectorRanker)}
        near = {name: (part, weight) for name, (part, weight) in named.items() if isinstance(part, NeighbourRanker)}
        if not dense:
            raise UserError("this row has no vectors: no table of vectors has its scores", _OTHER_ROW)
        tables = [named[name][1] * part.items_NZ for name, part in dense.items()]
        if isinstance(first := fusion.parts[0], VectorRanker):
            tables[0] = tables[0] + _predicted_vectors(fusion, first.items_NZ)
        elif isinstance(first, NeighbourRanker) and list(_lacking(fusion)):
            near[names[0]] = _predicting(fusion, first), 1.0
        return cls(np.concatenate(tables, 1, dtype=np.float32), dense, near)

    def users(self, histories: Sequence[Rows]) -> Float32:
        """Return user vectors, (B, F); or (B, K, F), of which the best score counts."""
        nobody = np.zeros(len(histories), np.int64)
        parts = [part.users(nobody, histories) for part in self.dense.values()]
        wide = [part if part.ndim == 3 else part[:, None] for part in parts]
        most = max(part.shape[1] for part in wide)
        vectors_BKF = np.concatenate([np.broadcast_to(of, (len(of), most, of.shape[2])) for of in wide], 2)
        return vectors_BKF[:, 0] if most == 1 else vectors_BKF

    def near(self, histories: Sequence[Rows]) -> csr_matrix:
        """Return what the neighbour models add, (B, N), times their weights."""
        near_BN = csr_matrix((len(histories), len(self.items_NF)), dtype=np.float32)
        for part, weight in self.sparse.values():
            near_BN = near_BN + np.float32(weight) * part.near(histories)
        return near_BN

    def best(
        self, users: Float32, histories: Sequence[Rows], candidates: Sequence[Rows], k: int
    ) -> list[tuple[Rows, Float32]]:
        """Return each user's k best new items among candidates and what the neighbour tables list, with their scores.

        They are the best of the catalogue if the candidates hold the k + seen items of the largest inner product.

        Args:
            users: as `users` returns them.
            histories: item rows, oldest first.
            candidates: item rows of each user.
            k: number of items.
        """
        near_BN = self.near(histories)
        best = []
        for user, (history, rows) in enumerate(zip(histories, candidates, strict=True)):
            near_1N = near_BN[[user]]
            among = np.setdiff1d(np.concatenate([rows, near_1N.indices]).astype(np.int64), history)
            scores = (self.items_NF[among] @ users[user].reshape(-1, users.shape[-1]).T).max(1)
            scores = scores + near_1N[:, among].toarray().ravel()
            order = np.lexsort((among, -scores))[:k]
            best.append((among[order], scores[order].astype(np.float32)))
        return best


class DenseScores:
    """The scores of users by a dense form, a block at a time; see `Scores`.

    Args:
        form: of the row.
        histories: item rows of each user, oldest first.
    """

    def __init__(self, form: DenseForm, histories: Sequence[Rows]) -> None:
        self._dense = VectorScores(form.users(histories), form.items_NF)
        near_BN = form.near(histories)
        self.n_users, self.n_items, self.width = len(histories), self._dense.n_items, self._dense.width + 1
        full = 2 * near_BN.nnz > self.n_users * self.n_items  # a sparse entry takes twice the memory of a dense one
        self._near_BN = torch.from_numpy(near_BN.toarray()) if full else near_BN

    def block(self, users: slice) -> torch.Tensor:
        """See `Scores`."""
        scores_CN = self._dense.block(users)
        near_BN = self._near_BN
        near_CN = near_BN[users] if torch.is_tensor(near_BN) else _rows_of(near_BN, *users.indices(self.n_users)[:2])
        return scores_CN.add_(near_CN)


def _rows_of(table: csr_matrix, start: int, end: int) -> torch.Tensor:
    """Return rows of a sparse table as a sparse tensor, without a copy of its values."""
    ends = table.indptr[start : end + 1]
    own = slice(ends[0], ends[-1])
    starts, columns, values = map(torch.from_numpy, (ends - ends[0], table.indices[own], table.data[own]))
    with warnings.catch_warnings():  # torch says that these tensors are in beta
        warnings.simplefilter("ignore")
        size = (end - start, table.shape[1])
        return torch.sparse_csr_tensor(starts, columns, values, size=size, check_invariants=False)


def _predicted_vectors(fusion: FusedRanker, first_NZ: Float32) -> npt.NDArray[np.float64]:
    """Return what the first part's item vectors get for the items that other parts lack, (N, Z)."""
    added_NZ = np.zeros(first_NZ.shape)
    for lacking_N, scale in _lacking(fusion):
        added_NZ += scale * lacking_N[:, None] * (first_NZ - first_NZ[~lacking_N].mean(0))
    return added_NZ


def _predicting(fusion: FusedRanker, first: NeighbourRanker) -> NeighbourRanker:
    """Return the first part with its weight, and what it predicts for the items that other parts lack, in its table."""
    weight_N = np.full(first.table_NN.shape[0], fusion.weights[0])
    for lacking_N, scale in _lacking(fusion):
        weight_N += scale * lacking_N
    if (weight_N < 0).any():
        raise UserError("this row lowers the score of items by their neighbours: no table has its scores", _OTHER_ROW)
    return first.scaled(weight_N)


def _lacking(fusion: FusedRanker) -> Iterator[tuple[npt.NDArray[np.bool_], float]]:
    """Yield the items that a part after the first lacks, (N,), and its weight times its slope, where that counts."""
    for part, weight, slope in list(zip(fusion.parts, fusion.weights, fusion.slopes, strict=True))[1:]:
        if part.lacking_N is not None and part.lacking_N.any() and weight * slope:
            yield part.lacking_N, weight * slope
