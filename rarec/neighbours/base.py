"""Neighbour models: from a prepared dataset to a table of each item's nearest other items.

Scores are above 0; `rarec.neighbours.scores` has the formula that sums them over a history.

Shape letters: N catalogue, M neighbours kept, P pairs of an item and a neighbour, A added items.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from rarec.config.neighbours import NeighbourConfig
from rarec.data import tables
from rarec.data.dataset import PreparedDataset
from rarec.data.tables import IN_MEMORY, Scratch
from rarec.errors import UserError

if TYPE_CHECKING:
    from rarec.data.engines import PrepareEngine


Rows = npt.NDArray[np.integer]
Float32 = npt.NDArray[np.float32]

TABLE, VECTORS = "neighbours.parquet", "vectors.npy"
"""Files: the table, and the vectors of texts that it was made from, where it `reads_llm`."""
LARGEST = 1e12
"""Score that is taken from a file: sums of larger ones might overflow."""
BLOCK = 1 << 22
"""Number of scores held at a time."""
ROWS = 1 << 20
"""Rows read at a time."""
_COLUMNS = {"item_row": pa.int32(), "neighbour_row": pa.int32(), "score": pa.float32()}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()])


class TextVectors(Protocol):
    """The frozen language model's vectors of texts; zero for an empty one.

    Attributes:
        known_ND: of the catalogue's titles and texts.
    """

    known_ND: Float32

    def encode(self, texts: Sequence[str]) -> Float32:
        """Return the vectors of other texts, (A, D)."""


class NewItems(Protocol):
    """The neighbours of items that come into a catalogue after its table was made."""

    def neighbours_of(self, title: str, text: str) -> tuple[Rows, Float32]:
        """Return the items that have a new one as a neighbour, and its scores."""

    def added(self, titles: Sequence[str], texts: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of new items (A,) in the table, and those of other items that they are neighbours of."""


class NeighbourModel(ABC):
    """Base class of neighbour models. A subclass implements `fit`, has a `title`, and may have the other attributes.

    Args:
        config: its settings, an instance of its `Config`.
        open_engine: opens the engine of the section `prepare`, for a model that counts in it.

    Attributes:
        Config: a subclass of `NeighbourConfig`: its fields are the settings that shape the table. Those of the section
            `neighbours` have the section's values, all others are set in `neighbours.settings`.
        title: its name in tables and reports.
        knows_new_items: whether it scores items that do not occur in training.
        reads_llm: whether it needs the language model's vectors of texts.
        vectors_ND: these, of titles and texts, or the vectors of a source; set before the table is made.
        limit: the field of the `Config` that is the largest catalogue for it.
        needs: what the data lacks if no item has a neighbour.
    """

    Config: ClassVar[type[NeighbourConfig]] = NeighbourConfig
    title: ClassVar[str]
    knows_new_items: ClassVar[bool] = False
    reads_llm: ClassVar[bool] = False
    vectors_ND: Float32 | None = None
    limit: ClassVar[str | None] = None
    needs: ClassVar[str] = "no user has two different items"

    def __init__(
        self, config: NeighbourConfig, open_engine: Callable[[], AbstractContextManager["PrepareEngine"]]
    ) -> None:
        self.config, self.open_engine = config, open_engine

    @property
    def largest(self) -> float:
        """The number of items of the largest catalogue for it."""
        return float(getattr(self.config, self.limit)) if self.limit else float("inf")

    @abstractmethod
    def fit(self, dataset: PreparedDataset) -> sparse.csr_matrix:
        """Return the scores of each item's neighbours (N, N), from the training interactions, titles and texts.

        A row may hold more than the M best, the item itself, and scores that are not above 0: they are left out.
        """

    def rows(self, dataset: PreparedDataset) -> Iterable[pa.RecordBatch]:
        """Return the rows of the table: the M best neighbours of each item, best first."""
        scores_NN = self.fit(dataset)
        n_items = dataset.n_items
        if not sparse.issparse(scores_NN) or scores_NN.shape != (n_items, n_items):
            problem = f"{type(self).__name__}.fit returns {getattr(scores_NN, 'shape', type(scores_NN).__name__)}"
            raise UserError(f"field `neighbours.models`: {problem}", f"return a sparse matrix ({n_items}, {n_items})")
        scores_NN = scores_NN.tocsr()
        near = (
            nearest(item, scores_NN.indices[start:end], scores_NN.data[start:end], self.config.top)
            for item, (start, end) in enumerate(pairwise(scores_NN.indptr))
        )
        return [pairs_of(matrix_of(near, n_items))]

    @classmethod
    def new_items(
        cls,
        titles: Sequence[str],
        texts: Sequence[str],
        untitled: str,
        table_NN: sparse.csr_matrix,
        top: int,
        vectors: TextVectors | None = None,
    ) -> NewItems | None:
        """Return what finds the neighbours of new items; for a model that knows them.

        Args:
            titles: of the catalogue, (N,).
            texts: of the catalogue, (N,).
            untitled: the text that replaces a missing title.
            table_NN: its table.
            top: M.
            vectors: the language model's, if there is one: without it, a model that `reads_llm` returns None.
        """
        raise NotImplementedError(f"{cls.__name__} knows no new items")


def nearest(item: int, items: Rows, scores: Float32, top: int) -> tuple[Rows, Float32]:
    """Return the M best neighbours of an item and their scores, best first; equal scores go to the smaller row.

    Args:
        item: row of the item, which is none of them.
        items: rows of items that may be.
        scores: their scores; a neighbour's is above 0.
        top: M.
    """
    kept = (scores > 0) & (items != item)
    items, scores = items[kept], scores[kept]
    if top < len(scores):
        near = scores >= np.partition(scores, -top)[-top]
        items, scores = items[near], scores[near]
    best = np.lexsort((items, -scores))[:top]
    return items[best], scores[best]


def last_scores(table_NN: sparse.csr_matrix, top: int) -> Float32:
    """Return the score of each item's last neighbour, (N,); 0 where it has fewer than M."""
    data = np.append(table_NN.data, np.float32(0))
    least_N = np.minimum.reduceat(data, table_NN.indptr[:-1])
    return np.where(np.diff(table_NN.indptr) >= top, least_N, np.float32(0))


def plain_texts(titles: Iterable[str], texts: Iterable[str], untitled: str) -> Iterator[str]:
    """Yield the words of items; `untitled` stands for a missing title, and is none of them."""
    return (text if title == untitled else f"{title} {text}" for title, text in zip(titles, texts, strict=True))


def matrix_of(near: Iterable[tuple[Rows, Float32]], n_items: int) -> sparse.csr_matrix:
    """Return a matrix of neighbours and their scores, given for one item after the other."""
    items, scores = zip(*near, strict=True)
    starts = np.cumsum([0, *map(len, items)])
    data = np.concatenate(scores).astype(np.float32, copy=False)
    return sparse.csr_matrix((data, np.concatenate(items), starts), (len(items), n_items))


def batch_of(rows: Rows, neighbours: Rows, scores: Float32) -> pa.RecordBatch:
    """Return rows of a table."""
    return pa.RecordBatch.from_pydict({"item_row": rows, "neighbour_row": neighbours, "score": scores})


def pairs_of(table_NN: sparse.csr_matrix) -> pa.RecordBatch:
    """Return all rows of a table, by item."""
    pairs = table_NN.tocoo()
    return batch_of(pairs.row, pairs.col, pairs.data)


def write_table(batches: Iterable[pa.RecordBatch], directory: Path) -> int:
    """Write a table; return the number of its rows."""
    return tables.write_rows(batches, directory / TABLE, SCHEMA)


def read_table(path: Path | pa.BufferReader, n_items: int, scratch: Scratch = IN_MEMORY) -> sparse.csr_matrix:
    """Read a table as a sparse matrix, (N, N), some of its rows at a time.

    Args:
        path: of the table, or its bytes.
        n_items: N.
        scratch: where the matrix is kept.

    Raises:
        ValueError: the file has other columns, an item is not in the catalogue, or a score not above 0.
    """
    with pq.ParquetFile(path) as file:
        if file.schema_arrow.names != SCHEMA.names or file.schema_arrow.types != SCHEMA.types:
            raise ValueError(f"its columns are not those of a neighbour table: {', '.join(map(str, SCHEMA))}")
        starts_N = np.zeros(n_items + 1, np.int64)
        for rows, near, scores in _parts(file):
            if min(rows.min(), near.min()) < 0 or max(rows.max(), near.max()) >= n_items:
                raise ValueError("an item is not in the catalogue")
            if not ((scores > 0) & (scores <= LARGEST)).all():
                raise ValueError(f"a score is not above 0, or above {LARGEST:g}")
            items, counts = np.unique(rows, return_counts=True)
            starts_N[items + 1] += counts
        starts_N = starts_N.cumsum()
        pairs = file.metadata.num_rows
        near_P, scores_P = scratch.zeros((pairs,), np.int32), scratch.zeros((pairs,), np.float32)
        free_N = starts_N[:-1].copy()
        for rows, near, scores in _parts(file):  # in any order: items that were added later are at the end
            order = np.argsort(rows, kind="stable")
            items, firsts, counts = np.unique(rows[order], return_index=True, return_counts=True)
            places = np.repeat(free_N[items] - firsts, counts) + np.arange(len(rows))
            near_P[places], scores_P[places] = near[order], scores[order]
            free_N[items] += counts
    return sparse.csr_matrix((scores_P, near_P, starts_N), (n_items, n_items))


def _parts(file: pq.ParquetFile) -> Iterator[tuple[Rows, Rows, Float32]]:
    """Yield rows, neighbours and scores, some at a time."""
    for batch in file.iter_batches(ROWS, use_threads=False):
        rows, near, scores = (batch[name].to_numpy() for name in SCHEMA.names)
        yield rows, near, scores
