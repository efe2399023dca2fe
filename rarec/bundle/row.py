"""The row that is served, as every engine reads it: its parts, and how they are fused. Needs no torch.

A row has a dense form: one table of item vectors, what any vector index takes, and the neighbour tables that are added
to it. The score of a user and an item is the inner product of their vectors there, plus that of the neighbour tables,
which is not zero for the few items alone that they list.

Shape letters: N catalogue, V vectors of a user, Z size of a scored vector, F size of the fused vectors, P pairs of a
neighbour table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rarec.bundle.recommended import Catalogue, Rows
from rarec.bundle.rules import BY_DEFAULT, Asked
from rarec.config.neighbours import built_in
from rarec.errors import UserError
from rarec.neighbours.scores import item_weights, part_scores, shares
from rarec.ranking.order import LearnedOrder, reordered

if TYPE_CHECKING:
    from rarec.neighbours.base import NewItems, TextVectors

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Table = tuple[npt.NDArray[np.integer], npt.NDArray[np.integer], Float32]
"""A neighbour table by item: where the item's neighbours begin and end (N + 1,), all neighbours (P,), their scores."""


@dataclass(frozen=True)
class Part:
    """A part of the row; see `FusedRanker`.

    Attributes:
        title: its name in answers.
        weight: of its scores.
        new_weight: of its scores of new items.
        vectors_NZ: item vectors; None of a neighbour table.
        lacking_N: marks items without a vector, which are scored as the mean item; None for none.
    """

    title: str
    weight: float
    new_weight: float
    vectors_NZ: Float32 | None
    lacking_N: Mask | None


@dataclass(frozen=True)
class Row:
    """The row that is served.

    Attributes:
        name: in the results, such as `per_layer+id`.
        parts: by name, in the order of the fusion.
        tables: of the parts that are neighbour tables, by name.
        newest: number of items of a history that neighbour tables read.
        decay: factor by each older item.
        compared: name of the part by whose vectors items are compared, if there is one.
        untitled: the text that replaces a missing title.
        top: number of neighbours that a table keeps of each item.
        order: that the best items are in, if it was learned; tables of vectors have the scores before it.
        asked: how the row was evaluated.
    """

    name: str
    parts: Mapping[str, Part]
    tables: Mapping[str, Table]
    newest: int
    decay: float
    compared: str | None
    untitled: str = ""
    top: int = 0
    order: LearnedOrder | None = None
    asked: Asked = BY_DEFAULT

    @cached_property
    def dense(self) -> dict[str, Part]:
        """The parts that have vectors, by name; the searched vectors are those of these parts, side by side."""
        return {name: part for name, part in self.parts.items() if part.vectors_NZ is not None}

    @property
    def lists(self) -> bool:
        """Return whether the row scores the few items alone that it lists for a user."""
        return bool(self.tables) and not self.dense

    @cached_property
    def compared_NZ(self) -> Float32 | None:
        """The vectors by which items are compared, zero where the part lacks an item; None where there are none."""
        if self.compared is None:
            return None
        vectors_NZ, lacking_N = self.parts[self.compared].vectors_NZ, self.parts[self.compared].lacking_N
        if vectors_NZ is None or lacking_N is None or not lacking_N.any():
            return vectors_NZ
        return np.where(lacking_N[:, None], np.float32(0), vectors_NZ)

    @cached_property
    def items_NF(self) -> Float32:
        """The item vectors of the dense form: those of each dense part times its weight, side by side."""
        vectors = {name: part.vectors_NZ for name, part in self.dense.items() if part.vectors_NZ is not None}
        weights = {name: np.asarray(self.item_weights[name], np.float32) for name in vectors}
        tables = [(weights[name] * table_NZ.T).T for name, table_NZ in vectors.items()]
        count = len(tables[0]) if tables else len(next(iter(self.tables.values()))[0]) - 1
        return np.concatenate([np.zeros((count, 0)), *tables], 1, dtype=np.float32)

    @cached_property
    def table_weights(self) -> dict[str, Float64]:
        """The weight of each item's score by each neighbour table, (N,) by name."""
        weights = self.item_weights
        return {name: np.broadcast_to(weights[name], len(starts) - 1) for name, (starts, *_) in self.tables.items()}

    @cached_property
    def item_weights(self) -> dict[str, Float64]:
        """The weight of each item's score by each part; see `item_weights`."""
        return item_weights(self.parts)

    def check_form(self) -> None:
        """Refuse a row without vectors.

        Raises:
            UserError: no part has vectors.
        """
        if self.lists:
            problem = "this row has no vectors: no table of vectors has its scores"
            raise UserError(problem, "export a row with a variant: VARIANT+id")

    def part_scores(self, query_VF: Float32, history: Rows) -> dict[str, Float32]:
        """Return the scores of the catalogue by each part alone, (N,) by name.

        Args:
            query_VF: vectors of the user.
            history: item rows, oldest first.
        """
        return part_scores(self.parts, self.tables, query_VF, history, self.newest, self.decay)

    def shares(self, query_VF: Float32, history: Rows) -> Float32:
        """Return what each part adds to the score of each item, (N, P); arguments as of `part_scores`."""
        added_NP: Float32 = shares(self.item_weights, self.part_scores(query_VF, history))
        return added_NP

    def whole(self, shares_NP: Float32, history: Rows) -> Float32:
        """Return the scores of items from what each part adds to them, in the row's order, (N,)."""
        whole_N: Float32 = shares_NP.sum(1, dtype=np.float32)
        if self.order is None:
            return whole_N
        return reordered(self.order, shares_NP, history, exclude_seen=self.asked.exclude_seen)

    def neighbours(self, item: int) -> Rows:
        """Return the items that are bought with one, best first, by a table of the row; none where it has none."""
        if not self.tables:
            return np.empty(0, np.int64)
        starts, neighbours, scores = self.tables[min(self.tables, key=lambda name: (name != "cooccurrence", name))]
        own = slice(starts[item], starts[item + 1])
        return neighbours[own][np.argsort(-scores[own])].astype(np.int64)

    def new_items(self, catalogue: Catalogue, vectors: "TextVectors | None" = None) -> "dict[str, NewItems]":
        """Return what finds the neighbours of new items, for each table whose model is of rarec and knows them.

        Args:
            catalogue: the items.
            vectors: the language model's, of texts; without them, a model that needs them is left out.
        """
        from scipy.sparse import csr_matrix

        finders = {}
        for name, (starts, neighbours, scores) in self.tables.items():
            model = built_in(name)
            if model is not None and model.knows_new_items:
                table_NN = csr_matrix((scores, neighbours, starts), (len(starts) - 1, len(starts) - 1))
                known = catalogue.titles, catalogue.texts, self.untitled, table_NN, self.top
                finders[name] = model.new_items(*known, vectors)
        return {name: finder for name, finder in finders.items() if finder is not None}
