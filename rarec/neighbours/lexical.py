"""Neighbours by words: the cosine of TF-IDF vectors of titles and texts.

Shape letters: N catalogue, C items of a block, M neighbours kept, A added items.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from scipy import sparse

from rarec.config.neighbours import NeighbourConfig
from rarec.data.dataset import PreparedDataset
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

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer


class Lexical(NeighbourModel):
    """Items whose titles and texts share words.

    Words are case-folded; a word's weight is `(1 + log count) * (1 + log((1 + N) / (1 + items with it)))`.
    """

    class Config(NeighbourConfig):
        """See `Neighbours`."""

        lexical_items: int

    title = "similar words (TF-IDF)"
    knows_new_items = True
    limit = "lexical_items"
    needs = "no two items share a word"

    config: Config

    def fit(self, dataset: PreparedDataset) -> sparse.csr_matrix:
        """See `NeighbourModel`."""
        try:
            vectors = _vectoriser().fit_transform(plain_texts(dataset.titles, dataset.texts, dataset.untitled))
        except ValueError:  # no text has a word
            return sparse.csr_matrix((dataset.n_items, dataset.n_items), dtype=np.float32)
        return matrix_of(_near(vectors, vectors, 0, self.config.top), dataset.n_items)

    @classmethod
    def new_items(
        cls,
        titles: Sequence[str],
        texts: Sequence[str],
        untitled: str,
        table_NN: sparse.csr_matrix,
        top: int,
        vectors: TextVectors | None = None,
    ) -> "Words":
        """See `NeighbourModel`."""
        return Words(titles, texts, untitled, table_NN, top)


class Words:
    """The words of a catalogue, with which new items are compared; see `NewItems`.

    They weigh as in the catalogue as it is now: if items came or went since its table was made, slightly differently.

    Args:
        titles: of the catalogue, (N,).
        texts: of the catalogue, (N,).
        untitled: the text that replaces a missing title.
        table_NN: its neighbour table of words.
        top: M.
    """

    def __init__(
        self, titles: Sequence[str], texts: Sequence[str], untitled: str, table_NN: sparse.csr_matrix, top: int
    ) -> None:
        self._untitled = untitled
        self._top = top
        self._vectoriser = _vectoriser()
        try:
            self._known = self._vectoriser.fit_transform(plain_texts(titles, texts, untitled))
        except ValueError:  # no text has a word
            self._known = None
        self._least_N = last_scores(table_NN, top)

    def neighbours_of(self, title: str, text: str) -> tuple[Rows, Float32]:
        """See `NewItems`. An item takes the new one beside its old neighbours if it is as near as the last of these."""
        if self._known is None:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        new = self._vectoriser.transform(plain_texts([title], [text], self._untitled))
        scores_N = (new @ self._known.T).toarray().ravel()
        near = np.flatnonzero((scores_N > 0) & (scores_N >= self._least_N))
        return near, scores_N[near]

    def added(self, titles: Sequence[str], texts: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """See `NewItems`. The scores of the items that were there stay, and none of their neighbours goes."""
        if self._known is None:
            return
        new = self._vectoriser.transform(plain_texts(titles, texts, self._untitled))
        first = self._known.shape[0]
        for item, (near, scores) in enumerate(_near(new, sparse.vstack([self._known, new]), first, self._top), first):
            yield batch_of(np.full(len(near), item), near, scores)
        for item, (title, text) in enumerate(zip(titles, texts, strict=True), first):
            near, scores = self.neighbours_of(title, text)
            yield batch_of(near, np.full(len(near), item), scores)


def _vectoriser() -> "TfidfVectorizer":
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes longer to import than most commands need

    return TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+", dtype=np.float32)


def _near(
    rows: sparse.csr_matrix, catalogue: sparse.csr_matrix, first: int, top: int
) -> Iterator[tuple[Rows, Float32]]:
    """Yield the neighbours of some items of the catalogue, of which `first` is the row of the first, and the scores."""
    size = max(BLOCK // catalogue.shape[0], 1)
    for start in range(0, rows.shape[0], size):
        scores_CN = rows[start : start + size] @ catalogue.T
        for row, (begin, end) in enumerate(pairwise(scores_CN.indptr), first + start):
            yield nearest(row, scores_CN.indices[begin:end], scores_CN.data[begin:end], top)
