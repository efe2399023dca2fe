"""Neighbours by words: the cosine of TF-IDF vectors of titles and texts.

Shape letters: N catalogue, C items of a block, M neighbours kept.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from sklearn.feature_extraction.text import TfidfVectorizer

from rarec.neighbours.table import nearest

BLOCK = 1 << 22
"""Number of scores held at a time."""


def lexical(texts: Sequence[str], top: int) -> Iterator[pa.RecordBatch]:
    """Yield the neighbour table of items whose texts share words.

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
        yield from (nearest(start + row, scores_N, top) for row, scores_N in enumerate(scores_CN))
