"""What a recommender answers, whatever computes its scores: PyTorch, or ONNX Runtime. Needs no torch.

Shape letters: B users, N catalogue, K items returned, V vectors of a user, Z size of a scored vector, F size of the
fused vectors.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rarec.bundle.recommended import (
    Catalogue,
    Explanation,
    History,
    Id,
    Place,
    Recommendations,
    Recommended,
    Request,
    Rows,
)
from rarec.bundle.row import Row
from rarec.bundle.rules import Plan, Rules, check_k, lists_of
from rarec.errors import UserError
from rarec.neighbours.scores import NEW, newest_first, score

if TYPE_CHECKING:
    from rarec.neighbours.base import NewItems, TextVectors

Float32 = npt.NDArray[np.float32]


class NotOffered(UserError):
    """A folder, or what is installed here, lacks what an answer needs."""


class BaseRecommender(ABC):
    """Ranks the items of a catalogue for any history. Several threads may share one.

    A subclass computes the scores.

    Args:
        served: the row that is served.
        catalogue: the items.
        date: the column of the items' dates, if there is one.

    Attributes:
        row: name of the row.
        items: ids of the catalogue.
        rules: what narrows, mixes and fills the lists.
        no_place: why `place` cannot answer, if so.
        text_vectors: the language model's vectors of texts, if they are there.
    """

    no_place: NotOffered | None = None
    text_vectors: "TextVectors | None" = None

    def __init__(self, served: Row, catalogue: Catalogue, date: str | None) -> None:
        self._row, self.row, self.catalogue = served, served.name, catalogue
        self.items: list[Id] = catalogue.ids.to_pylist()
        columns, compared_NZ = catalogue.columns, served.compared_NZ
        self.rules = Rules(self.items, catalogue.counts_N, columns, date, compared_NZ, served.lists, served.asked)

    # What a subclass has.

    @abstractmethod
    def best(self, plans: Sequence[Plan]) -> list[tuple[Rows, Float32]]:
        """Return the best items that each request allows, as many as its plan wants, and their scores; -1 is none."""

    @abstractmethod
    def queries(self, histories: Sequence[Rows]) -> Float32:
        """Return the vectors of users (B, V, F), whose best inner product with an item's is the score by vectors."""

    @abstractmethod
    def encode_new(self, title: str, text: str) -> Float32:
        """Return the variant's vector (Z,) of an item without ID vectors. Raises `UserError` where there is none."""

    @cached_property
    def _new_items(self) -> "Mapping[str, NewItems]":
        return self._row.new_items(self.catalogue, self.text_vectors)

    # What it answers.

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 10,
        *,
        exclude_seen: bool | None = None,
        allow: Collection[Id] | None = None,
        deny: Collection[Id] = (),
        where: str | None = None,
        diversify: float = 0.0,
        fallback: str = "popularity",
    ) -> Recommendations:
        """Return the k best items for each history.

        Args:
            histories: of each user the ids of items, oldest first. Ids that are not in the catalogue are skipped and
                counted.
            k: number of items.
            exclude_seen: leave out the items of the history; by default as the row was evaluated (`evaluate`).
            allow: the only items that may be returned; all by default. Unknown ids are skipped, here and in `deny`, and
                are in the answer.
            deny: items that may not be returned.
            where: a condition on the catalogue's columns; items of which it is not true may not be returned.
            diversify: from 0 to 1, how much an item's likeness to those before it in the list counts against it. The
                next item of a list is the one with the largest (1 - diversify) relevance - diversify * its largest
                cosine with one before it, where relevance is the score, scaled to 0..1 among the candidates: the 10 k
                best, at least 100 and at most 1000 (maximal marginal relevance, Carbonell and Goldstein 1998).
            fallback: what an empty history gets, and what fills a list where the model scores too few items:
                `popularity`, `recent` (the newest items, if the catalogue has dates) or `none`. These have the score 0.

        Raises:
            UserError: k is not positive, `diversify` is not within 0 and 1, `fallback` or `where` is wrong, or the
                bundle lacks what they need: dates, item vectors, columns.
        """
        rules = (k, exclude_seen, allow, deny, where, diversify, fallback)
        return self.answer([Request(own, *rules) for own in lists_of(histories)])

    def answer(self, requests: Sequence[Request]) -> Recommendations:
        """Return the items that each of several users asks for, in one pass of the model.

        Raises:
            UserError: see `recommend`.
        """
        histories, unknown = self.rules.rows([request.history for request in requests])
        plans = self.rules.plans(requests, histories)
        return Recommendations(self._ranked(plans), unknown, [plan.unknown for plan in plans])

    def recommend_to(self, histories: Sequence[Rows], k: int = 10, **rules: Any) -> list[list[Recommended]]:
        """Return the k best items for histories of item rows, as `open_log` yields them; rules as of `Request`."""
        known = [self._row.asked.known(history) for history in histories]
        return self._ranked(self.rules.plans([Request((), k, **rules)] * len(known), known))

    def _ranked(self, plans: Sequence[Plan]) -> list[list[Recommended]]:
        asked = [plan for plan in plans if plan.candidates]
        best = iter(self.best(asked) if asked else ())
        nothing = np.empty(0, np.int64), np.empty(0, np.float32)
        return [self._listed(*plan.listed(*(next(best) if plan.candidates else nothing))) for plan in plans]

    def _listed(self, rows_K: Rows, scores_K: Float32) -> list[Recommended]:
        """Return items by their rows; -1 is none."""
        titles = self.catalogue.titles
        scored = zip(rows_K.tolist(), scores_K.tolist(), strict=True)
        return [Recommended(self.items[row], titles[row], score) for row, score in scored if row >= 0]

    def query_vectors(self, histories: Sequence[History]) -> Float32:
        """Return what a vector index is searched with, (B, F); (B, K, F) where the best of K scores counts.

        The inner product with an item's `values` in the tables of `rarec export BUNDLE --to vectors` is the score of
        this row without its neighbour tables; `rerank` adds them, and a learned order.

        Raises:
            UserError: there is no history, or this row has no vectors.
        """
        self._row.check_form()
        rows, _ = self.rules.rows(histories, empty=False)
        vectors_BVF = self.queries(rows)
        return vectors_BVF[:, 0] if vectors_BVF.shape[1] == 1 else vectors_BVF

    def similar(self, item: Id, k: int = 10) -> list[Recommended]:
        """Return the k items whose vectors have the largest cosine with an item's.

        Raises:
            UserError: k is not positive, the item is not in the catalogue, or this row has no vectors.
        """
        check_k(k)
        row = int(self._known([item])[0])
        if self._row.compared_NZ is None:
            raise UserError(f"{self.row} has no item vectors", "export a row with a variant or the ID model")
        cosines_N = _cosines(self._row.compared_NZ, row)
        cosines_N[row] = -np.inf
        best = np.argsort(-cosines_N, kind="stable")[: min(k, len(cosines_N) - 1)]
        return self._listed(best, cosines_N[best])

    def explain(self, history: History, item: Id, k: int = 3) -> Explanation:
        """Return the evidence for an item after a history: each part's share of the score, the k nearest items.

        Shares are compared with those of the average item. A learned order goes by more than their sum.

        Raises:
            UserError: k is not positive, or the item is not in the catalogue.
        """
        check_k(k)
        (rows,), _ = self.rules.rows([history])
        row = int(self._known([item])[0])
        shares_NP = self._row.shares(self.queries([rows])[0], rows)
        above_P = (shares_NP[row] - shares_NP.mean(0)).tolist()
        each = zip(self._row.parts.items(), shares_NP[row], above_P, strict=True)
        shares = {part.title: above for (name, part), share, above in each if name != NEW or share}
        return Explanation(item, self.catalogue.titles[row], shares, self._nearest(rows, row, k))

    def _nearest(self, rows: Rows, row: int, k: int) -> list[Recommended]:
        """Return the items of a history that are most like another; none where there are no vectors."""
        if self._row.compared_NZ is None or not len(rows):
            return []
        cosines_N = _cosines(self._row.compared_NZ, row)
        best = np.array(sorted(set(rows.tolist()), key=lambda known: -cosines_N[known])[:k])
        return self._listed(best, cosines_N[best])

    def compare(self, history: History, k: int = 10) -> dict[str, list[Recommended]]:
        """Return the k best items by each part of the row alone, by the part's title.

        Raises:
            UserError: k is not positive.
        """
        check_k(k)
        (rows,), _ = self.rules.rows([history])
        best = {}
        for name, scores_N in self._row.part_scores(self.queries([rows])[0], rows).items():
            if name == NEW:
                continue
            order = _order(scores_N, self._row.asked.seen(rows))[:k]
            best[self._row.parts[name].title] = self._listed(order, scores_N[order])
        return best

    def place(self, history: History, title: str, text: str = "", around: int = 3) -> Place:
        """Return the place that a new item would have after a history, if `rarec items add` had added it.

        Raises:
            NotOffered: see `no_place`.
            UserError: this row has no language model.
        """
        if self.no_place:
            raise self.no_place.with_traceback(None)
        (rows,), _ = self.rules.rows([history])
        query_VF = self.queries([rows])[0]
        shares_NP = np.vstack([self._row.shares(query_VF, rows), self._shares_of_new(query_VF, rows, title, text)])
        *known, new = self._row.whole(shares_NP, rows).tolist()
        scores_N = np.array(known, np.float32)
        order = _order(scores_N, self._row.asked.seen(rows))
        rank = int((scores_N[order] >= new).sum()) + 1
        beside = order[max(0, rank - 1 - around) : rank - 1], order[rank - 1 : rank - 1 + around]
        return Place(rank, len(order) + 1, new, *(self._listed(part, scores_N[part]) for part in beside))

    def _shares_of_new(self, query_VF: Float32, history: Rows, title: str, text: str) -> Float32:
        """Return what each part would add to the score of an item if `rarec items add` had added it, (P,)."""
        vector_Z = self.encode_new(title, text)  # raises for a row without a variant
        variant = self._row.compared
        assert variant is not None
        sizes = [part.vectors_NZ.shape[1] for part in self._row.dense.values() if part.vectors_NZ is not None]
        queries = dict(zip(self._row.dense, np.split(query_VF, np.cumsum(sizes)[:-1], 1), strict=True))
        scores = {variant: float((queries[variant] @ vector_Z).max()), NEW: 1.0}
        scores |= {name: self._near_new(finder, history, title, text) for name, finder in self._new_items.items()}
        return np.array([part.new_weight * scores.get(name, 0.0) for name, part in self._row.parts.items()], np.float32)

    def _near_new(self, finder: "NewItems", history: Rows, title: str, text: str) -> float:
        """Return the score of a new item by a neighbour table."""
        newest, weights, _ = newest_first([history], self._row.newest, self._row.decay)
        rows, near = finder.neighbours_of(title, text)
        near_N = np.zeros(len(self.items))
        near_N[rows] = near
        return float(score((weights * near_N[newest]).sum()))

    def sample_user(self, length: int = 5) -> list[int]:
        """Return the item rows of a user who might be: a popular item, then neighbours of those before."""
        rng = np.random.default_rng()
        chances_N = chances(self.catalogue.counts_N)
        rows = [int(rng.choice(len(chances_N), p=chances_N))]
        while len(rows) < min(length, len(chances_N)):
            near = self._row.neighbours(int(rng.choice(rows)))[:10]
            new = np.setdiff1d(near if rng.random() < 0.9 else np.arange(len(chances_N)), rows)
            rows += [int(rng.choice(new))] if len(new) else []
        return rows

    def _known(self, items: Collection[Id]) -> Rows:
        """Return the rows of items, all of which must be in the catalogue."""
        items = list(items)
        rows = [self.rules.row_of.get(str(item)) for item in items]
        if None in rows:
            raise UserError(f"item {items[rows.index(None)]!r} is not in the catalogue", "leave it out")
        return np.array(rows, np.int64)


def chances(counts_N: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Return the chance of each item to be in a sample: the root of its count."""
    roots_N = np.sqrt(counts_N + 1.0)
    chances_N: npt.NDArray[np.float64] = roots_N / roots_N.sum()
    return chances_N


def _order(scores_N: Float32, seen: Rows) -> Rows:
    """Return the items that were not seen, best first."""
    order = np.argsort(-scores_N, kind="stable")
    return order[~np.isin(order, seen)]


def _cosines(vectors: Float32, row: int) -> Float32:
    """Return the cosine of every vector with one of them, (N,)."""
    lengths_N = np.maximum(np.linalg.norm(vectors, axis=1), np.finfo(np.float32).tiny)
    cosines_N: Float32 = vectors @ vectors[row] / lengths_N / lengths_N[row]
    return cosines_N
