"""A recommender over a bundle: histories of item ids in, ranked items out. It needs no run and no dataset.

Shape letters: B users, N catalogue, K items returned, Z size of a scored vector, F size of the fused vectors.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix

from rarec.bundle.bundle import IDS, MODEL, Bundle, Float32, Rows
from rarec.bundle.items import score_of_new
from rarec.bundle.parts import Parts, chances, unknown_users
from rarec.bundle.recommended import Explanation, History, Id, Place, Recommendations, Recommended, Request
from rarec.config.section import check_device
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.evaluation.results import part_title
from rarec.ranking.rank import USERS_AT_A_TIME, best_scores

_LISTS = 'give a list of item ids for each user: [["sku-1", "sku-7"], ["sku-2"]]'


class _User(NamedTuple):
    """One user, by item rows.

    Attributes:
        history: oldest first.
        k: number of items.
        hidden: items that may not be returned.
        popular: whether to rank by popularity.
    """

    history: Rows
    k: int
    hidden: Rows
    popular: bool


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
    """

    def __init__(
        self, bundle: Bundle, *, device: str = "auto", llm: str | None = None, batch_size: int | None = None
    ) -> None:
        self.bundle = bundle
        self.parts = Parts(bundle, llm=llm, batch_size=batch_size, world=World(device=_device(device)))
        self.items: list[Id] = bundle.catalogue.ids.to_pylist()
        self._row_of = {str(item): row for row, item in enumerate(self.items)}

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        allow: Collection[Id] | None = None,
        deny: Collection[Id] = (),
        popular_if_empty: bool = False,
    ) -> Recommendations:
        """Return the k best items for each history.

        Args:
            histories: of each user the ids of items, oldest first. Ids that are not in the catalogue are skipped and
                counted; an empty history gets what the model says of it.
            k: number of items.
            exclude_seen: leave out the items of the history.
            allow: the only items that may be returned; all by default.
            deny: items that may not be returned.
            popular_if_empty: rank by popularity where no item of the history is in the catalogue.

        Raises:
            UserError: k is not positive, or `allow` or `deny` names an item that is not in the catalogue.
        """
        requests = [Request(own, k, exclude_seen, allow, deny, popular_if_empty) for own in _lists(histories)]
        return self.answer(requests)

    def answer(self, requests: Sequence[Request]) -> Recommendations:
        """Return the items that each of several users asks for, in one pass of the model.

        Raises:
            UserError: see `recommend`.
        """
        _check_k(*(request.k for request in requests))
        histories, unknown = self._rows([request.history for request in requests])
        hidden: dict[tuple[int, int], Rows] = {}  # most requests leave out the same
        users = []
        for request, history in zip(requests, histories, strict=True):
            key = id(request.allow), id(request.deny)
            if key not in hidden:
                hidden[key] = self._hidden(request.allow, request.deny)
            own = np.union1d(hidden[key], history if request.exclude_seen else ()).astype(np.int64)
            users.append(_User(history, request.k, own, request.popular_if_empty and not len(history)))
        return Recommendations(self._ranked(users), unknown)

    def recommend_to(self, histories: Sequence[Rows], k: int = 10) -> list[list[Recommended]]:
        """Return the k best new items for histories of item rows, as `open_log` yields them."""
        return self._ranked([_User(history, k, history, False) for history in histories])

    def _ranked(self, users: Sequence[_User]) -> list[list[Recommended]]:
        items: list[list[Recommended]] = [[] for _ in users]
        for popular in (False, True):
            places = [place for place, user in enumerate(users) if user.popular == popular]
            for start in range(0, len(places), USERS_AT_A_TIME):
                chunk = [users[place] for place in places[start : start + USERS_AT_A_TIME]]
                scores = self.parts.scored([user.history for user in chunk], popular=popular)
                best = best_scores(scores, max(user.k for user in chunk), [user.hidden for user in chunk])
                for place, user, rows_K, scores_K in zip(places[start:], chunk, *best, strict=False):
                    items[place] = self._listed(rows_K[: user.k], scores_K[: user.k])
        return items

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
        rows, _ = self._rows(histories, empty=False)
        return self.parts.encoder.users(np.zeros(len(rows), np.int64), rows)

    def query_vectors(self, histories: Sequence[History]) -> Float32:
        """Return what a vector index is searched with, (B, F); (B, K, F) where the best of K scores counts.

        The inner product with an item's `values` in the tables of `rarec export BUNDLE --to vectors` is the score of
        this row without its neighbour tables; `rerank` adds them.

        Raises:
            UserError: there is no history, or this row has no vectors.
        """
        rows, _ = self._rows(histories, empty=False)
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
        _check_k(k)
        rows, unknown = self._rows(histories, empty=False)
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
        _check_k(k)
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
        _check_k(k)
        (rows,), _ = self._rows([history])
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
        _check_k(k)
        (rows,), _ = self._rows([history])
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
        (rows,), _ = self._rows([history])
        score = score_of_new(self.parts, rows, title, text)
        scores_N = self.parts.scored([rows]).block(slice(0, 1))[0].numpy().copy()
        scores_N[rows] = -np.inf
        order = np.argsort(-scores_N, kind="stable")[: len(scores_N) - len(np.unique(rows))]
        rank = int((scores_N[order] >= score).sum()) + 1
        beside = order[max(0, rank - 1 - around) : rank - 1], order[rank - 1 : rank - 1 + around]
        return Place(rank, len(order) + 1, score, *(self._listed(part, scores_N[part]) for part in beside))

    def sample_user(self, length: int = 5) -> list[int]:
        """Return the item rows of a user who might be: a popular item, then neighbours of those before."""
        bundle = self.bundle
        rng = np.random.default_rng()
        chances_N = chances(bundle)
        rows = [int(rng.choice(len(chances_N), p=chances_N))]
        tables = sorted(bundle.tables, key=lambda name: name != "cooccurrence")
        table_NN = bundle.near[tables[0]] if tables else csr_matrix((len(chances_N),) * 2)
        while len(rows) < min(length, len(chances_N)):
            own = table_NN.getrow(int(rng.choice(rows)))
            nearest = own.indices[np.argsort(-own.data)[:10]]
            new = np.setdiff1d(nearest if rng.random() < 0.9 else np.arange(len(chances_N)), rows)
            rows += [int(rng.choice(new))] if len(new) else []
        return rows

    def _rows(self, histories: Sequence[History], empty: bool = True) -> tuple[list[Rows], list[int]]:
        """Return the item rows of histories, and how many ids of each are not in the catalogue.

        Args:
            histories: of each user the ids of items.
            empty: whether there may be no history at all.
        """
        rows = [np.array([self._row_of.get(str(item), -1) for item in own], np.int64) for own in _lists(histories)]
        if not rows and not empty:
            raise UserError("there is no history", _LISTS)
        return [own[own >= 0] for own in rows], [int((own < 0).sum()) for own in rows]

    def _known(self, items: Collection[Id]) -> Rows:
        """Return the rows of items, all of which must be in the catalogue."""
        items = list(items)
        rows = [self._row_of.get(str(item)) for item in items]
        if None in rows:
            raise UserError(f"item {items[rows.index(None)]!r} is not in the catalogue", "leave it out")
        return np.array(rows, np.int64)

    def _hidden(self, allow: Collection[Id] | None, deny: Collection[Id]) -> Rows:
        """Return the rows of items that may not be returned."""
        hidden_N = np.full(len(self._row_of), allow is not None)
        hidden_N[self._known(allow or ())] = False
        hidden_N[self._known(deny)] = True
        return np.flatnonzero(hidden_N)


def _cosines(vectors: Float32, row: int) -> Float32:
    """Return the cosine of every vector with one of them, (N,)."""
    lengths_N = np.maximum(np.linalg.norm(vectors, axis=1), np.finfo(np.float32).tiny)
    cosines_N: Float32 = vectors @ vectors[row] / lengths_N / lengths_N[row]
    return cosines_N


def _lists(histories: Iterable[Iterable[Id]]) -> list[list[Id]]:
    """Return histories as lists, since an iterator can be read only once; refuse what holds no item ids."""
    lists = [_list(history, "a history is no list") for history in _list(histories, "histories are no list of lists")]
    for item in chain.from_iterable(lists):
        if not isinstance(item, str | int | np.integer):
            raise UserError(f"an item of a history is {str(item)[:50]!r}, neither text nor an integer", _LISTS)
    return lists


def _list(values: Any, problem: str) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{problem}, but {str(values)[:50]!r}", _LISTS)
    return list(values)


def _check_k(*numbers: int) -> None:
    """Refuse a number of items that is not positive."""
    for k in numbers:
        if k < 1:
            raise UserError(f"k is {k}", "ask for at least one item")


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
