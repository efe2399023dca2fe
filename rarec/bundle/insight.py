"""Look into a ranking: what each part adds, each part's own ranking, and where a new item would stand.

Shape letters: N catalogue, F size of the fused vectors, K vectors of a user.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rarec.bundle.bundle import IDS, MODEL
from rarec.bundle.items import LEXICAL, words_of
from rarec.bundle.parts import Parts
from rarec.errors import UserError
from rarec.evaluation.labels import part_title
from rarec.neighbours.lexical import Words, plain_texts
from rarec.ranking import EvalBatch, FusedRanker, VectorRanker
from rarec.ranking.rank import best_scores
from rarec.ranking.rankers import FusedScores

KNOWN_BY_WORDS = (LEXICAL, "popularity")
"""Parts that know a new item: by its words, and as one that was never bought."""
Rows = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class Standing(NamedTuple):
    """Where a new item would stand in a user's ranking.

    Attributes:
        rank: among the items that the user has not seen and the new one; 1 is the best.
        of: number of these.
        score: of the new item.
        above: rows and scores of the items right above it, best first.
        below: of those right below it.
    """

    rank: int
    of: int
    score: float
    above: tuple[Rows, Float32]
    below: tuple[Rows, Float32]


class Insight:
    """Looks into the ranking of a bundle's row: its parts, its nearest items, the place of a new one.

    Args:
        parts: of the bundle.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self._bundle = parts, parts.bundle

    def cosines_N(self, row: int) -> Float32:
        """Return the cosine of every item's vector with one item's, (N,).

        Raises:
            UserError: this row has no vectors.
        """
        vectors = self.vectors
        if vectors is None:
            problem = f"{self._bundle.facts['row']} has no item vectors"
            raise UserError(problem, "export a row with a variant or the ID model")
        lengths_N = np.maximum(np.linalg.norm(vectors, axis=1), np.finfo(np.float32).tiny)
        cosines_N: Float32 = vectors @ vectors[row] / lengths_N / lengths_N[row]
        return cosines_N

    @property
    def vectors(self) -> Float32 | None:
        """Return the vectors by which items are compared: the variant's, or else the ID model's."""
        vectors = self._bundle.vectors
        return vectors.get(MODEL, vectors.get(IDS + self._bundle.facts["id_model"]))

    def shares(self, history: Rows, row: int) -> dict[str, float]:
        """Return what each part adds to an item's score, compared with the average item; by the part's title."""
        ranker, nobody = self._parts.ranker, np.zeros(1, np.int64)
        scored = ranker.scored(EvalBatch(nobody, [history], np.array([row])))
        of_parts = scored.parts(slice(0, 1)) if isinstance(scored, FusedScores) else [scored.block(slice(0, 1))]
        weights = ranker.weights if isinstance(ranker, FusedRanker) else (1.0,)
        added = (weight * float(part[0, row] - part[0].mean()) for part, weight in zip(of_parts, weights, strict=True))
        return dict(zip(map(part_title, self._parts.rankers), added, strict=True))

    def by_part(self, history: Rows, k: int) -> Iterator[tuple[str, tuple[Rows, Float32]]]:
        """Yield each part's title, and rows and scores of its k best new items alone."""
        batch = EvalBatch(np.zeros(1, np.int64), [history], np.zeros(1, np.int64))
        for name, ranker in self._parts.rankers.items():
            (rows_K,), (scores_K,) = best_scores(ranker.scored(batch), k, [history])
            yield part_title(name), (rows_K[rows_K >= 0], scores_K[rows_K >= 0])

    def place(self, history: Rows, title: str, text: str, around: int) -> Standing:
        """Return where an item would stand that `rarec items add` had added.

        Args:
            history: item rows, oldest first.
            title: of the new item.
            text: of the new item, "" if there is none.
            around: number of items to return above and below it.

        Raises:
            UserError: this row has no language model.
        """
        parts = self._parts
        own_F, query_KF = self._vector_F(title, text), parts.dense.users([history])[0]
        score = float((query_KF.reshape(-1, len(own_F)) @ own_F).max()) + self._by_words(history, title, text)
        scores_N = parts.scored([history]).block(slice(0, 1))[0].numpy().copy()
        scores_N[history] = -np.inf
        order = np.argsort(-scores_N, kind="stable")[: len(scores_N) - len(np.unique(history))]
        rank = int((scores_N[order] >= score).sum()) + 1
        above, below = order[max(0, rank - 1 - around) : rank - 1], order[rank - 1 : rank - 1 + around]
        return Standing(rank, len(order) + 1, score, (above, scores_N[above]), (below, scores_N[below]))

    def _vector_F(self, title: str, text: str) -> Float32:
        """Return the item's vector of the dense form; what other parts do not know is predicted from the first's."""
        parts, facts, (first, *others) = self._parts, self._bundle.facts["parts"], self._parts.rankers
        sources = {name: np.zeros((1, source.dim), np.float32) for name, source in parts.encoder.sources.items()}
        (own_Z,) = parts.encode_new([title], [text], sources)
        vector_Z, beside = facts[first]["weight"] * own_Z, list[Float32]()
        for name in others:
            ranker, weight = parts.rankers[name], facts[name]["weight"]
            known = slice(None) if ranker.lacking_N is None else ~ranker.lacking_N
            if name not in KNOWN_BY_WORDS:
                away_Z = own_Z - self._bundle.vectors[MODEL][known].mean(0)
                vector_Z = vector_Z + weight * facts[name]["slope"] * away_Z
            if isinstance(ranker, VectorRanker):
                mean_Z = ranker.items_NZ[known].mean(0)
                beside.append(weight * (mean_Z if name not in KNOWN_BY_WORDS else np.zeros_like(mean_Z)))
        return np.concatenate([vector_Z, *beside], dtype=np.float32)

    def _by_words(self, history: Rows, title: str, text: str) -> float:
        """Return what the neighbour table of words adds to the item's score."""
        if LEXICAL not in self._parts.dense.sparse:
            return 0.0
        ranker, weight = self._parts.dense.sparse[LEXICAL]
        (words,) = plain_texts([title], [text], self._bundle.facts["tables"]["items"]["untitled"])
        near, scores = self._words.neighbours_of(words)
        near_N = np.zeros(len(self._bundle.catalogue.titles))
        near_N[near] = scores
        newest = history[-ranker.newest :][::-1]
        return weight * float(np.sqrt((ranker.decay ** np.arange(len(newest)) * near_N[newest]).sum()))

    @cached_property
    def _words(self) -> Words:
        return words_of(self._bundle)
