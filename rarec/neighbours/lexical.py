"""Neighbours by words: the cosine of TF-IDF vectors of titles and texts.

Shape letters: N catalogue, C items of a block, M neighbours kept, A added items.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from rarec.neighbours.table import batch_of, nearest

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

Rows = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
BLOCK = 1 << 22
"""Number of scores held at a time."""


def plain_texts(titles: Iterable[str], texts: Iterable[str], untitled: str) -> Iterator[str]:
    """Yield the words of items; `untitled` stands for a missing title, and is none of them."""
    return (text if title == untitled else f"{title} {text}" for title, text in zip(titles, texts, strict=True))


def lexical(texts: Iterable[str], top: int) -> Iterator[pa.RecordBatch]:
    """Yield the neighbour table of items whose texts share words.

    Words are case-folded; a word's weight is `(1 + log count) * (1 + log((1 + N) / (1 + items with it)))`.

    Args:
        texts: of the catalogue, (N,).
        top: M.
    """
    try:
        vectors = _vectoriser().fit_transform(texts)
    except ValueError:  # no text has a word
        return
    yield from _nearest(vectors, vectors, 0, top)


class Words:
    """The words of a catalogue, with which new items are compared.

    They weigh as in the catalogue as it is now: if items came or went since its table was made, a little otherwise than
    they did then.

    Args:
        texts: of the catalogue, (N,).
        table_NN: its neighbour table of words.
        top: M.
    """

    def __init__(self, texts: Iterable[str], table_NN: sparse.csr_matrix, top: int) -> None:
        self._top, self._vectoriser = top, _vectoriser()
        try:
            self._old = self._vectoriser.fit_transform(texts)
        except ValueError:  # no text has a word
            self._old = None
        sizes_N, data = np.diff(table_NN.indptr), np.append(table_NN.data, np.float32(0))
        least_N = np.minimum.reduceat(data, table_NN.indptr[:-1])
        self._least_N = np.where(sizes_N >= top, least_N, 0.0)

    def neighbours_of(self, text: str) -> tuple[Rows, Float32]:
        """Return the items that have a new one as a neighbour, and its scores; no pair of the table is lost to it."""
        if self._old is None:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        scores_N = np.asarray((self._vectoriser.transform([text]) @ self._old.T).todense()).ravel()
        near = np.flatnonzero((scores_N > 0) & (scores_N >= self._least_N))
        return near, scores_N[near]

    def added(self, texts: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield what the table gains by new items (A,): their neighbours, and they as neighbours of others.

        The scores of the items that were there stay.
        """
        if self._old is None:
            return
        new, first = self._vectoriser.transform(texts), self._old.shape[0]
        yield from _nearest(new, sparse.vstack([self._old, new]), first, self._top)
        for row, text in enumerate(texts):
            near, scores = self.neighbours_of(text)
            yield batch_of(near, np.full(len(near), first + row), scores)


def _vectoriser() -> "TfidfVectorizer":
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes longer to import than most commands need

    return TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+", dtype=np.float32)


def _nearest(rows: sparse.csr_matrix, catalogue: sparse.csr_matrix, first: int, top: int) -> Iterator[pa.RecordBatch]:
    """Yield the neighbours of some items of the catalogue, of which `first` is the row of the first."""
    size = max(BLOCK // catalogue.shape[0], 1)
    for start in range(0, rows.shape[0], size):
        scores_CN = np.asarray((rows[start : start + size] @ catalogue.T).todense())
        yield from (nearest(first + start + row, scores_N, top) for row, scores_N in enumerate(scores_CN))
