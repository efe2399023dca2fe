"""A shop's rules for a list: which items may be in it, how different they are, what fills it where the model is silent.

They are the same for every engine, and need no torch.

Shape letters: N catalogue, C candidates, K items of a list, E size of the vectors by which items are compared.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rarec.bundle.conditions import matching
from rarec.bundle.recommended import History, Id, Request, Rows
from rarec.errors import UserError

Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
POPULARITY, RECENT, NONE = "popularity", "recent", "none"
FALLBACKS = (POPULARITY, RECENT, NONE)
FEWEST, MOST = 100, 1000
"""Candidates of a list that is diversified: ten times its length, within these bounds."""
_LISTS = 'give a list of item ids for each user: [["sku-1", "sku-7"], ["sku-2"]]'
KEPT = 16
"""Conditions whose items are kept."""


@dataclass(frozen=True)
class Asked:
    """The rules under which a row was evaluated, and under which it serves: the fields of `evaluate` of that name.

    Attributes:
        exclude_seen: whether the items of a history may not be returned, unless a request says otherwise.
        max_history: number of newest items of a history that are read; None for all.
    """

    exclude_seen: bool = True
    max_history: int | None = None

    def known(self, history: Rows) -> Rows:
        """Return the part of a history that is read."""
        return history if self.max_history is None else history[-self.max_history :]

    def seen(self, history: Rows) -> Rows:
        """Return the items of a history that may not be returned."""
        return history if self.exclude_seen else history[:0]


BY_DEFAULT = Asked()


@dataclass(frozen=True)
class Plan:
    """What one request's list is made of.

    Attributes:
        request: what is asked for.
        history: item rows, oldest first.
        excluded_N: marks items that may not be returned; shared by requests of the same rules, None for no such item.
        unknown: ids of `allow` and `deny` that the catalogue lacks.
        rules: of the catalogue.
    """

    request: Request
    history: Rows
    excluded_N: Mask | None
    unknown: list[Id]
    rules: "Rules"

    @property
    def candidates(self) -> int:
        """The number of best items that the model must give; 0 where the fallback alone answers."""
        if not len(self.history) and self.request.fallback != NONE:
            return 0
        k = self.request.k
        return k if not self.request.diversify else max(k, min(max(10 * k, FEWEST), MOST))

    @property
    def seen(self) -> Rows:
        """The rows of the history, if they may not be returned."""
        exclude, asked = self.request.exclude_seen, self.rules.asked
        return (asked if exclude is None else replace(asked, exclude_seen=exclude)).seen(self.history)

    def listed(self, rows_C: Rows, scores_C: Float32) -> tuple[Rows, Float32]:
        """Return the list, rows and scores (K,), made of the model's best items; a fallback's have the score 0.

        Args:
            rows_C: the best items that may be returned, best first; -1 is none.
            scores_C: their scores.
        """
        scored_C = (rows_C >= 0) & ((scores_C > 0) | (not self.rules.lists))
        rows, scores = rows_C[scored_C], scores_C[scored_C]
        k = self.request.k
        if self.request.diversify:
            order = diversified(scores[:MOST], self.rules.vectors_of(rows[:MOST]), k, self.request.diversify)
            rows, scores = (np.concatenate([part[order], np.delete(part, order)]) for part in (rows, scores))
        rows, scores = rows[:k], scores[:k]
        if len(rows) < k and (order_N := self.rules.order(self.request.fallback)) is not None:
            out_N = np.zeros(len(order_N), np.bool_) if self.excluded_N is None else self.excluded_N.copy()
            out_N[self.seen] = out_N[rows] = True
            more = order_N[~out_N[order_N]][: k - len(rows)]
            rows, scores = np.concatenate([rows, more]), np.concatenate([scores, np.zeros(len(more), np.float32)])
        return rows, scores


class Rules:
    """What rules need of a catalogue.

    Args:
        ids: of the items, (N,).
        counts_N: number of training interactions of each item.
        columns: that conditions may name, (N,) each.
        date: name of the column that says how new an item is, if there is one.
        vectors_NE: by which items are compared; None where there are none.
        lists: whether the model scores the few items alone that it lists for a user, and says nothing of all others.
        asked: how the row was evaluated.
    """

    def __init__(
        self,
        ids: Sequence[Id],
        counts_N: npt.NDArray[np.integer],
        columns: Mapping[str, pa.Array],
        date: str | None = None,
        vectors_NE: Float32 | None = None,
        lists: bool = False,
        asked: Asked = BY_DEFAULT,
    ) -> None:
        self.row_of = {str(item): row for row, item in enumerate(ids)}
        self.lists, self.asked = lists, asked
        self._counts_N, self._columns, self._date, self._vectors_NE = counts_N, columns, date, vectors_NE
        self.order = lru_cache(len(FALLBACKS))(self._order)
        self._matching = lru_cache(KEPT)(lambda condition: matching(condition, self._columns))

    def rows(self, histories: Sequence[History], *, empty: bool = True) -> tuple[list[Rows], list[int]]:
        """Return the item rows of what is read of histories, and how many ids of each are not in the catalogue.

        Args:
            histories: of each user the ids of items.
            empty: whether there may be no history at all.

        Raises:
            UserError: they are no lists of ids, or there is none.
        """
        rows = [np.array([self.row_of.get(str(item), -1) for item in own], np.int64) for own in lists_of(histories)]
        if not rows and not empty:
            raise UserError("there is no history", _LISTS)
        return [self.asked.known(own[own >= 0]) for own in rows], [int((own < 0).sum()) for own in rows]

    def plans(self, requests: Sequence[Request], histories: Sequence[Rows]) -> list[Plan]:
        """Return the plans of requests.

        Args:
            requests: of several users.
            histories: as `rows` returns them.

        Raises:
            UserError: k is not positive, `diversify` is not within 0 and 1 or there are no vectors, `fallback` is
                unknown or there are no dates, or `where` is no condition on the columns.
        """
        # most requests have the same rules
        excluded: dict[tuple[int, int, str | None], tuple[Mask | None, list[Id]]] = {}
        plans = []
        for request, history in zip(requests, histories, strict=True):
            self._check(request)
            key = id(request.allow), id(request.deny), request.where
            if key not in excluded:
                excluded[key] = self._excluded(request)
            plans.append(Plan(request, history, *excluded[key], self))
        return plans

    def vectors_of(self, rows: Rows) -> Float32:
        """Return the vectors by which items are compared."""
        if self._vectors_NE is None:
            raise UserError("diversify: this row has no item vectors", "export a row with a variant or the ID model")
        return np.asarray(self._vectors_NE[rows])

    def _check(self, request: Request) -> None:
        check_k(request.k)
        if not 0 <= request.diversify <= 1:
            raise UserError(f"diversify is {request.diversify}", "choose a number from 0 to 1")
        if request.diversify:
            self.vectors_of(np.empty(0, np.int64))
        if request.fallback not in FALLBACKS:
            raise UserError(f"fallback is {request.fallback!r}", f"choose from {', '.join(FALLBACKS)}")
        if request.fallback == RECENT:
            self.order(RECENT)

    def _excluded(self, request: Request) -> tuple[Mask | None, list[Id]]:
        """Return which items may not be returned, (N,), and the ids of `allow` and `deny` that are unknown."""
        if request.allow is None and not request.deny and request.where is None:
            return None, []
        unknown: dict[Id, None] = {}
        excluded_N = np.full(len(self.row_of), request.allow is not None)
        excluded_N[self._rows(request.allow or (), unknown)] = False
        excluded_N[self._rows(request.deny, unknown)] = True
        if request.where is not None:
            excluded_N |= ~self._matching(request.where)
        return excluded_N, list(unknown)

    def _rows(self, items: Collection[Id], unknown: dict[Id, None]) -> Rows:
        """Return the rows of items; note those that the catalogue lacks."""
        if isinstance(items, str | bytes):
            raise UserError(f"allow and deny are lists of item ids, not {items[:50]!r}", 'write ["sku-1", "sku-7"]')
        rows = {item: self.row_of.get(str(item)) for item in items}
        unknown |= {item: None for item, row in rows.items() if row is None}
        return np.array([row for row in rows.values() if row is not None], np.int64)

    def _order(self, fallback: str) -> Rows | None:
        """Return all rows in the order of a fallback, (N,); ties by popularity, then as in the catalogue."""
        if fallback == NONE:
            return None
        popular_N = np.argsort(-self._counts_N, kind="stable")
        if fallback == POPULARITY:
            return popular_N
        if self._date is None:
            remedy = "name the column of dates: prepare.items.date, or rarec items update BUNDLE TABLE --date COLUMN"
            raise UserError("fallback: the catalogue has no dates", remedy)
        times = self._columns[self._date]
        numbers = times.cast(pa.int64()) if pa.types.is_timestamp(times.type) else times
        times_N = numbers.to_numpy(zero_copy_only=False).astype(np.float64)  # NaN where it is missing, which is last
        return popular_N[np.argsort(-times_N[popular_N], kind="stable")]


def check_k(k: int) -> None:
    """Refuse a number of items that is not positive.

    Raises:
        UserError: it is not.
    """
    if k < 1:
        raise UserError(f"k is {k}", "ask for at least one item")


def diversified(scores_C: Float32, vectors_CE: Float32, k: int, share: float) -> Rows:
    """Return the places of k candidates by maximal marginal relevance, in the order in which they are chosen.

    The next is the one with the largest (1 - share) relevance - share * its largest cosine with a chosen one. Relevance
    is the score, scaled to 0..1 among the candidates (Carbonell and Goldstein 1998, with lambda = 1 - share).

    Args:
        scores_C: of the candidates, best first.
        vectors_CE: their vectors.
        k: number of items, at most C are returned.
        share: 0 keeps the order; 1 reads the vectors alone, after the best item.
    """
    spread = np.ptp(scores_C) if len(scores_C) else 0
    gains_C = (1 - share) * (scores_C - scores_C.min()) / spread if spread else np.zeros(len(scores_C))
    lengths_C1 = np.linalg.norm(vectors_CE, axis=1, keepdims=True)
    unit_CE = vectors_CE / np.maximum(lengths_C1, np.finfo(np.float32).tiny)
    nearest_C = np.full(len(scores_C), -np.inf)
    chosen: list[int] = []
    while len(chosen) < min(k, len(scores_C)):
        worth_C = gains_C - share * nearest_C if chosen else gains_C.copy()
        worth_C[chosen] = -np.inf
        chosen.append(int(np.argmax(worth_C)))
        nearest_C = np.maximum(nearest_C, unit_CE @ unit_CE[chosen[-1]])
    return np.array(chosen, np.int64)


def lists_of(histories: Iterable[Iterable[Id]]) -> list[list[Id]]:
    """Return histories as lists, since an iterator can be read only once.

    Raises:
        UserError: they are no lists of item ids.
    """
    lists = [_list(history, "a history is no list") for history in _list(histories, "histories are no list of lists")]
    for item in chain.from_iterable(lists):
        if not isinstance(item, str | int | np.integer):
            raise UserError(f"an item of a history is {str(item)[:50]!r}, neither text nor an integer", _LISTS)
    return lists


def _list(values: Any, problem: str) -> list[Any]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{problem}, but {str(values)[:50]!r}", _LISTS)
    return list(values)
