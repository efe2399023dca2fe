"""Neighbours by words: the cosine of TF-IDF vectors of titles and texts.

Shape letters: N catalogue, C items of a block, M neighbours kept.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.feature_extraction.text import TfidfVectorizer

BLOCK = 1 << 22
"""Number of scores held at a time."""


def lexical(texts: Sequence[str], top: int) -> Iterator[pa.RecordBatch]:
    """Yield a neighbour table (see `counting`) of items whose texts share words.

    Words are case-folded; a word's weight is `(1 + log count) * (1 + log((1 + N) / (1 + items with it)))`.

    Args:
        texts: of the catalogue, (N,).
        top: M.
    """
    try:
        vectors = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+", dtype=np.float32).fit_transform(texts)
    except ValueError:  # no text has a word
        return
    size = max(BLOCK // len(texts), 1)
    for start in range(0, len(texts), size):
        scores_CN = np.asarray((vectors[start : start + size] @ vectors.T).todense())
        scores_CN[np.arange(len(scores_CN)), start + np.arange(len(scores_CN))] = 0
        for row, scores_N in enumerate(scores_CN):
            found = best_of_row(scores_N, top)
            columns = {"item_row": np.full(len(found), start + row), "neighbour_row": found, "score": scores_N[found]}
            yield pa.RecordBatch.from_pydict(columns)


def best_of_row(scores_N: npt.NDArray[np.float32], top: int) -> npt.NDArray[np.int64]:
    """Return the rows of the best scores above 0, best first; equal scores go to the smaller row."""
    least = np.partition(scores_N, -top)[-top] if top < len(scores_N) else 0.0
    near = np.flatnonzero((scores_N >= least) & (scores_N > 0))
    best: npt.NDArray[np.int64] = near[np.lexsort((near, -scores_N[near]))][:top]
    return best
