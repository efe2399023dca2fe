"""Neighbours by meaning: the cosine of the frozen language model's vectors of titles and texts, without their mean.

What the language model knows before any training: the rival of what training adds to it.

Shape letters: N catalogue, D hidden size, C items of a block, M neighbours kept, A added items.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from rarec.config.neighbours import NeighbourConfig
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.neighbours.base import (
    BLOCK,
    Float32,
    NeighbourModel,
    Rows,
    TextVectors,
    batch_of,
    last_scores,
    matrix_of,
    nearest,
    plain_texts,
)


class Semantic(NeighbourModel):
    """Items whose titles and texts the language model reads alike."""

    class Config(NeighbourConfig):
        """See `Neighbours`."""

        semantic_items: int

    title = "similar meaning (frozen LM)"
    knows_new_items = True
    reads_llm = True
    limit = "semantic_items"
    needs = "no two items have a text"

    config: Config

    def fit(self, dataset: PreparedDataset) -> sparse.csr_matrix:
        """See `NeighbourModel`."""
        if self.vectors_ND is None:
            problem = f"`{type(self).__name__}` was given no vectors of the language model or of a source"
            raise UserError(problem, "make the table by: rarec neighbours CONFIG")
        vectors_ND = directions(self.vectors_ND)
        return matrix_of(_near(vectors_ND, vectors_ND, 0, self.config.top), dataset.n_items)

    @classmethod
    def new_items(
        cls,
        titles: Sequence[str],
        texts: Sequence[str],
        untitled: str,
        table_NN: sparse.csr_matrix,
        top: int,
        vectors: TextVectors | None = None,
    ) -> "Meanings | None":
        """See `NeighbourModel`."""
        return None if vectors is None else Meanings(vectors, untitled, table_NN, top)


class OfSource(Semantic):
    """Items whose vectors of a source are alike: what it says of the items before any training. See `source:NAME`."""

    title = "alike by"
    reads_llm = False
    needs = "no two items have a vector"


class Meanings:
    """The vectors of a catalogue's texts, with which new items are compared; see `NewItems`.

    Args:
        vectors: of the catalogue, and of other texts.
        untitled: the text that replaces a missing title.
        table_NN: its neighbour table.
        top: M.
    """

    def __init__(self, vectors: TextVectors, untitled: str, table_NN: sparse.csr_matrix, top: int) -> None:
        self._vectors, self._untitled, self._table_NN, self._top = vectors, untitled, table_NN, top
        self._known_ND = directions(vectors.known_ND)

    def neighbours_of(self, title: str, text: str) -> tuple[Rows, Float32]:
        """See `NewItems`. An item takes the new one beside its old neighbours if it is as near as the last of these."""
        (vector_D,) = self._new([title], [text])
        scores_N = self._known_ND @ vector_D
        near = np.flatnonzero((scores_N > 0) & (scores_N >= last_scores(self._table_NN, self._top)))
        return near, scores_N[near]

    def added(self, titles: Sequence[str], texts: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """See `NewItems`. The scores of the items that were there stay, and none of their neighbours goes."""
        new_AD, least_N = self._new(titles, texts), last_scores(self._table_NN, self._top)
        first = len(self._known_ND)
        whole_ND = np.concatenate([self._known_ND, new_AD])
        for item, (near, scores) in enumerate(_near(new_AD, whole_ND, first, self._top), first):
            yield batch_of(np.full(len(near), item), near, scores)
            scores_N = self._known_ND @ whole_ND[item]
            takes = np.flatnonzero((scores_N > 0) & (scores_N >= least_N))
            yield batch_of(takes, np.full(len(takes), item), scores_N[takes])

    def _new(self, titles: Sequence[str], texts: Sequence[str]) -> Float32:
        """Return the directions of new items, (A, D)."""
        own_AD = self._vectors.encode(list(plain_texts(titles, texts, self._untitled)))
        return directions(own_AD, self._vectors.known_ND)


def directions(vectors_ND: Float32, among_ND: Float32 | None = None) -> Float32:
    """Return vectors of texts without the mean of a catalogue's, of length 1; zero, as before, where there is no text.

    Args:
        vectors_ND: of texts.
        among_ND: of the catalogue, if it is another.
    """
    among_ND = vectors_ND if among_ND is None else among_ND
    told_N: npt.NDArray[np.bool_] = np.any(among_ND, axis=1)
    mean_D = among_ND[told_N].mean(0, dtype=np.float64) if told_N.any() else 0.0
    apart_ND: Float32 = ((vectors_ND - mean_D) * np.any(vectors_ND, axis=1, keepdims=True)).astype(np.float32)
    apart_ND /= np.maximum(np.linalg.norm(apart_ND, axis=1, keepdims=True), 1e-6)
    return apart_ND


def _near(rows_ND: Float32, catalogue_ND: Float32, first: int, top: int) -> Iterable[tuple[Rows, Float32]]:
    """Yield the neighbours of some items of the catalogue, of which `first` is the row of the first, and the scores."""
    items_N = np.arange(len(catalogue_ND))
    size = max(BLOCK // len(catalogue_ND), 1)
    for start in range(0, len(rows_ND), size):
        for row, scores_N in enumerate(rows_ND[start : start + size] @ catalogue_ND.T, first + start):
            yield nearest(row, items_N, scores_N, top)
