"""A recommender over a bundle: histories of item ids in, ranked items out. It needs no run and no dataset.

Shape letters: B users, N catalogue, K items returned, Z size of a scored vector, F size of the fused vectors.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rarec.bundle.bundle import IDS, MODEL, Bundle, Float32, Rows
from rarec.bundle.items import score_of_new
from rarec.bundle.parts import Parts, sample_history, unknown_users
from rarec.bundle.recommended import Explanation, History, Id, Place, Recommendations, Recommended, Request
from rarec.bundle.rules import Plan, Rules, check_k, lists_of
from rarec.config.section import check_device
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.evaluation.results import part_title
from rarec.ranking.rank import USERS_AT_A_TIME, best_scores


class Recommender:
    """Ranks the items of a bundle for any history. Several threads may share one.

    ```python
    import rarec

    recommender = rarec.load("runs/demo/bundle")
    recommender.recommend([["22423", "85123A"]], k=10)[0]
    ```

    Args:
        bundle: an opened bundle.
        device: where the language model runs: `cpu`, `cuda`, `cuda:1` or so, or `auto` for a GPU if there is one.
        llm: path or name of the language model, if it is elsewhere than at the export.
        batch_size: prompts in a forward pass; by default as many as in the evaluation.

    Attributes:
        items: ids of the catalogue.
        rules: what narrows, mixes and fills the lists.
    """

    def __init__(
        self, bundle: Bundle, *, device: str = "auto", llm: str | None = None, batch_size: int | None = None
    ) -> None:
        self.bundle = bundle
        self.parts = Parts(bundle, llm=llm, batch_size=batch_size, world=World(device=_device(device)))
        catalogue = bundle.catalogue
        self.items: list[Id] = catalogue.ids.to_pylist()
        lists = len(bundle.tables) == len(bundle.facts["parts"])
        self.rules = Rules(self.items, catalogue.counts_N, catalogue.columns, bundle.date, self._compared, lists)

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 10,
        *,
        exclude_seen: bool = True,
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
            exclude_seen: leave out the items of the history.
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
        """Return the k best new items for histories of item rows, as `open_log` yields them; rules as of `Request`."""
        return self._ranked(self.rules.plans([Request((), k, **rules)] * len(histories), histories))

    def _ranked(self, plans: Sequence[Plan]) -> list[list[Recommended]]:
        nothing = np.empty(0, np.int64), np.empty(0, np.float32)
        best = [nothing] * len(plans)
        places = [place for place, plan in enumerate(plans) if plan.candidates]
        for start in range(0, len(places), USERS_AT_A_TIME):
            chunk = [plans[place] for place in places[start : start + USERS_AT_A_TIME]]
            scores = self.parts.scored([plan.history for plan in chunk])
            most = max(plan.candidates for plan in chunk)
            found = best_scores(scores, most, [plan.seen for plan in chunk], [plan.shut_N for plan in chunk])
            for place, plan, rows_C, scores_C in zip(places[start:], chunk, *found, strict=False):
                best[place] = rows_C[: plan.candidates], scores_C[: plan.candidates]
        return [self._listed(*plan.listed(*own)) for plan, own in zip(plans, best, strict=True)]

    def _listed(self, rows_K: Rows, scores_K: Float32) -> list[Recommended]:
        """Return items by their rows; -1 is none."""
        titles = self.bundle.catalogue.titles
        scored = zip(rows_K.tolist(), scores_K.tolist(), strict=True)
        return [Recommended(self.items[row], titles[row], score) for row, score in scored if row >= 0]

    def user_vectors(self, histories: Sequence[History]) -> Float32:
        """Return the variant's user vectors, (B, Z).

        Raises:
            UserError: there is no history, or this row has no language model.
        """
        rows, _ = self.rules.rows(histories, empty=False)
        return self.parts.encoder.users(np.zeros(len(rows), np.int64), rows)

    def query_vectors(self, histories: Sequence[History]) -> Float32:
        """Return what a vector index is searched with, (B, F); (B, K, F) where the best of K scores counts.

        The inner product with an item's `values` in the tables of `rarec export BUNDLE --to vectors` is the score of
        this row without its neighbour tables; `rerank` adds them.

        Raises:
            UserError: there is no history, or this row has no vectors.
        """
        rows, _ = self.rules.rows(histories, empty=False)
        return self.parts.dense.users(rows)

    def rerank(self, histories: Sequence[History], candidates: Sequence[Sequence[Id]], k: int = 10) -> Recommendations:
        """Return each user's k best new items among candidates, such as a vector index finds, and the neighbours.

        With the k + len(history) best by inner product as candidates, these are the k best of the catalogue.

        Args:
            histories: ids of items, oldest first.
            candidates: ids of items, for each user.
            k: number of items.

        Raises:
            UserError: there is no history, or not one list of candidates for each; k is not positive; a candidate is
                not in the catalogue, or this row has no vectors.
        """
        check_k(k)
        rows, unknown = self.rules.rows(histories, empty=False)
        among = [self._known(items) for items in candidates]
        if len(among) != len(rows):
            raise UserError(f"{len(rows)} histories, but {len(among)} lists of candidates", "give one for each history")
        best = self.parts.dense.best(self.parts.dense.users(rows), rows, among, k)
        return Recommendations([self._listed(*user) for user in best], unknown)

    def item_vectors(self, items: Sequence[Id] | None = None) -> Float32:
        """Return the variant's item vectors, (N, Z), of some items or of all."""
        vectors = self.bundle.vectors[MODEL]
        return vectors if items is None else vectors[self._known(items)]

    def similar(self, item: Id, k: int = 10) -> list[Recommended]:
        """Return the k items whose vectors have the largest cosine with an item's.

        Raises:
            UserError: k is not positive, the item is not in the catalogue, or this row has no vectors.
        """
        check_k(k)
        row = int(self._known([item])[0])
        vectors = self._compared
        if vectors is None:
            problem = f"{self.bundle.facts['row']} has no item vectors"
            raise UserError(problem, "export a row with a variant or the ID model")
        cosines_N = _cosines(vectors, row)
        cosines_N[row] = -np.inf
        best = np.argsort(-cosines_N, kind="stable")[: min(k, len(cosines_N) - 1)]
        return self._listed(best, cosines_N[best])

    def explain(self, history: History, item: Id, k: int = 3) -> Explanation:
        """Return the evidence for an item after a history: each part's share of the score, the k nearest items.

        Raises:
            UserError: k is not positive, or the item is not in the catalogue.
        """
        check_k(k)
        (rows,), _ = self.rules.rows([history])
        row = int(self._known([item])[0])
        ranker = self.parts.ranker
        scores = ranker.scored(unknown_users([rows])).parts(slice(0, 1))
        added = [
            weight * float(part[0, row] - part[0].mean())  # compared with the average item
            for part, weight in zip(scores, ranker.weights, strict=True)
        ]
        shares = dict(zip(map(part_title, self.parts.rankers), added, strict=True))
        return Explanation(item, self.bundle.catalogue.titles[row], shares, self._nearest(rows, row, k))

    def _nearest(self, rows: Rows, row: int, k: int) -> list[Recommended]:
        """Return the items of a history that are most like another; none where there are no vectors."""
        if self._compared is None or not len(rows):
            return []
        cosines_N = _cosines(self._compared, row)
        best = np.array(sorted(set(rows.tolist()), key=lambda known: -cosines_N[known])[:k])
        return self._listed(best, cosines_N[best])

    @property
    def _compared(self) -> Float32 | None:
        """The vectors by which items are compared: the variant's, or else the ID model's."""
        vectors = self.bundle.vectors
        return vectors.get(MODEL, vectors.get(IDS + self.bundle.facts["id_model"]))

    def compare(self, history: History, k: int = 10) -> dict[str, list[Recommended]]:
        """Return the k best new items by each part of the row alone, by the part's title.

        Raises:
            UserError: k is not positive.
        """
        check_k(k)
        (rows,), _ = self.rules.rows([history])
        best = {}
        for name, ranker in self.parts.rankers.items():
            (rows_K,), (scores_K,) = best_scores(ranker.scored(unknown_users([rows])), k, [rows])
            best[part_title(name)] = self._listed(rows_K, scores_K)
        return best

    def place(self, history: History, title: str, text: str = "", around: int = 3) -> Place:
        """Return the place that a new item would have after a history, if `rarec items add` had added it.

        Raises:
            UserError: this row has no language model.
        """
        (rows,), _ = self.rules.rows([history])
        score = score_of_new(self.parts, rows, title, text)
        scores_N = self.parts.scored([rows]).block(slice(0, 1))[0].numpy().copy()
        scores_N[rows] = -np.inf
        order = np.argsort(-scores_N, kind="stable")[: len(scores_N) - len(np.unique(rows))]
        rank = int((scores_N[order] >= score).sum()) + 1
        beside = order[max(0, rank - 1 - around) : rank - 1], order[rank - 1 : rank - 1 + around]
        return Place(rank, len(order) + 1, score, *(self._listed(part, scores_N[part]) for part in beside))

    def sample_user(self, length: int = 5) -> list[int]:
        """Return the item rows of a user who might be."""
        return sample_history(self.bundle, length)

    def _known(self, items: Collection[Id]) -> Rows:
        """Return the rows of items, all of which must be in the catalogue."""
        items = list(items)
        rows = [self.rules.row_of.get(str(item)) for item in items]
        if None in rows:
            raise UserError(f"item {items[rows.index(None)]!r} is not in the catalogue", "leave it out")
        return np.array(rows, np.int64)


def _cosines(vectors: Float32, row: int) -> Float32:
    """Return the cosine of every vector with one of them, (N,)."""
    lengths_N = np.maximum(np.linalg.norm(vectors, axis=1), np.finfo(np.float32).tiny)
    cosines_N: Float32 = vectors @ vectors[row] / lengths_N / lengths_N[row]
    return cosines_N


def _device(wanted: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`."""
    available = torch.cuda.is_available()
    try:
        check_device(wanted)
        if wanted.startswith("cuda") and not available:
            raise ValueError("there is no GPU that PyTorch can use: choose auto or cpu")
    except ValueError as error:
        raise UserError(f"device {wanted!r} cannot be used", str(error)) from None
    return torch.device(wanted if wanted != "auto" else "cuda" if available else "cpu")


def load(
    bundle: str | Path, *, device: str = "auto", llm: str | None = None, trusted: Collection[str] = ()
) -> Recommender:
    """Open a bundle that `rarec export` has written.

    Args:
        bundle: its folder.
        device: see `Recommender`.
        llm: see `Recommender`.
        trusted: parts of your own that it may import, as `package.module:Name`.

    Raises:
        UserError: it is missing or damaged, or of another version.
    """
    return Recommender(Bundle.open(Path(bundle), trusted), device=device, llm=llm)
