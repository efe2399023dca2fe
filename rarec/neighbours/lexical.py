"""Neighbours by words: the cosine of TF-IDF vectors of titles and texts.

Shape letters: N catalogue, C items of a block, M neighbours kept, A added items.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from rarec.neighbours.table import batch_of, nearest

BLOCK = 1 << 22
"""Number of scores held at a time."""


def plain_texts(titles: Sequence[str], texts: Sequence[str], untitled: str) -> list[str]:
    """Return the words of items; `untitled` stands for a missing title, and is none of them."""
    return [f"{title} {text}".replace(untitled, "") for title, text in zip(titles, texts, strict=True)]


def lexical(texts: Sequence[str], top: int) -> Iterator[pa.RecordBatch]:
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


def lexical_of_added(
    texts: Sequence[str], added: Sequence[str], table_NN: sparse.csr_matrix, top: int
) -> Iterator[pa.RecordBatch]:
    """Yield what a neighbour table of words gains by new items: their neighbours, and they as neighbours of others.

    Words weigh as before, and no pair of the table is lost, so that the scores of the items that were there stay.

    Args:
        texts: of the catalogue, (N,).
        added: of the new items, (A,).
        table_NN: the catalogue's own table.
        top: M.
    """
    try:
        vectoriser = _vectoriser().fit(texts)
    except ValueError:
        return
    old, new = vectoriser.transform(texts), vectoriser.transform(added)
    yield from _nearest(new, sparse.vstack([old, new]), len(texts), top)
    full_N = np.diff(table_NN.indptr) >= top
    least_N = np.array([table_NN.getrow(row).data.min() if full else 0.0 for row, full in enumerate(full_N)])
    for row in range(len(added)):
        scores_N = np.asarray((new[row] @ old.T).todense()).ravel()
        near = np.flatnonzero((scores_N > 0) & (scores_N >= least_N))
        yield batch_of(near, np.full(len(near), len(texts) + row), scores_N[near])


def _vectoriser() -> TfidfVectorizer:
    return TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+", dtype=np.float32)


def _nearest(rows: sparse.csr_matrix, catalogue: sparse.csr_matrix, first: int, top: int) -> Iterator[pa.RecordBatch]:
    """Yield the neighbours of some items of the catalogue, of which `first` is the row of the first."""
    size = max(BLOCK // catalogue.shape[0], 1)
    for start in range(0, rows.shape[0], size):
        scores_CN = np.asarray((rows[start : start + size] @ catalogue.T).todense())
        yield from (nearest(first + start + row, scores_N, top) for row, scores_N in enumerate(scores_CN))
