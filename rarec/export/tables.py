"""`--to vectors`: items with their vectors, neighbour tables, facts; `--to faiss`: an index of the vectors as well."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.bundle.bundle import TABLES
from rarec.bundle.parts import DenseForm, Parts, sample_histories
from rarec.data.tables import write_rows
from rarec.errors import UserError
from rarec.export import Target
from rarec.neighbours.base import SCHEMA, pairs_of
from rarec.storage.files import read_json, write_json

ITEMS, FACTS, INDEX = "items.parquet", "client.json", "index.faiss"
KINDS = {"flat": "Flat", "hnsw": "HNSW32", "ivf": "IVF{lists},Flat", "sqfp16": "SQfp16"}
"""What `--index` takes, as faiss' factory names it."""
SEARCHED = {"hnsw": "efSearch=128", "ivf": "nprobe=16"}
"""Parameters of the search, which are part of the index."""
CHECKED, K = 200, 10
"""Users, and items of each, for which an index is compared with the exact search."""


@dataclass(frozen=True)
class Vectors(Target):
    """`items.parquet`, the neighbour tables and `client.json`, for vector databases.

    `items.parquet` has a row for each item: `id`, `values` (its vector), `title`, `text`, `train_count`. The score of
    a user and an item is the inner product of the user's `Recommender.query_vectors` and `values`, plus what the
    neighbour tables add.
    """

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`."""
        form = parts.dense
        bundle = parts.bundle
        catalogue = bundle.catalogue
        size = form.items_NF.shape[1]
        values = pa.FixedSizeListArray.from_arrays(pa.array(form.items_NF.ravel()), size)
        columns = {"id": catalogue.ids, "values": values, "title": catalogue.titles, "text": catalogue.texts}
        pq.write_table(pa.table({**columns, "train_count": catalogue.counts_N}), directory / ITEMS, compression="zstd")
        for name, (ranker, _) in form.sparse.items():
            (directory / TABLES).mkdir(exist_ok=True)
            write_rows([pairs_of(ranker.table_NN)], directory / TABLES / f"{name}.parquet", SCHEMA)
        rule = bundle.facts["neighbours"] or {"newest": 0, "decay": 1.0}
        facts = {
            "row": bundle.facts["row"],
            "items": len(catalogue.titles),
            "dim": size,
            "neighbours": {name: float(weight) for name, (_, weight) in form.sparse.items()},
            "newest": rule["newest"],
            "decay": rule["decay"],
        }
        write_json(directory / FACTS, facts)
        return {}


def add_facts(directory: Path, **facts: Any) -> None:
    """Add fields to `client.json`."""
    write_json(directory / FACTS, {**read_json(directory / FACTS), **facts})


@dataclass(frozen=True)
class Faiss(Target):
    """The item vectors as an index, `index.faiss`.

    Attributes:
        index: its kind, of `KINDS`.
    """

    index: str = "flat"
    needs = ("vectors",)

    def __post_init__(self) -> None:
        if self.index not in KINDS:
            raise UserError(f"--index {self.index} is unknown", f"choose from {', '.join(KINDS)}")

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`. Figures: the kind, and the recall of the 10 best items by inner product."""
        try:
            import faiss
        except ImportError:
            raise UserError("--to faiss needs the package faiss", "pip install 'rarec[serving]'") from None
        form = parts.dense
        count, size = form.items_NF.shape
        lists = max(1, min(int(4 * count**0.5), count // 39))  # faiss trains each with 39 vectors or more
        index: Any = faiss.index_factory(size, KINDS[self.index].format(lists=lists), faiss.METRIC_INNER_PRODUCT)
        index.train(form.items_NF)
        index.add(form.items_NF)
        parameters: Any = faiss.ParameterSpace()
        parameters.set_index_parameters(index, SEARCHED.get(self.index, ""))
        if self.index == "ivf":
            index.make_direct_map()
        recall = _recall(index, form, parts)
        if self.index == "flat" and recall < 1:
            problem = f"the index finds {recall:.1%} of the items that the bundle finds"
            raise UserError(problem, "report it: this is a bug")
        faiss.write_index(index, str(directory / INDEX))
        return {"index": self.index, f"recall@{K}": recall}


def _recall(index: Any, form: DenseForm, parts: Parts) -> float:
    """Return the share of the exact 10 best by inner product that the index finds."""
    users = form.users(sample_histories(parts, CHECKED))
    queries = np.ascontiguousarray(users.reshape(-1, users.shape[-1]), np.float32)
    _, near = index.search(queries, min(K, len(form.items_NF)))
    return float(np.mean([_hit(rows_K, query, form) for rows_K, query in zip(near, queries, strict=True)]))


def _hit(rows_K: npt.NDArray[np.int64], query: npt.NDArray[np.float32], form: DenseForm) -> float:
    """Return the share of an index' items whose score is among the best; items of equal score count alike."""
    scores_N = form.items_NF @ query
    least = np.sort(scores_N)[-len(rows_K)]
    scores_K = scores_N[rows_K[rows_K >= 0]]
    return float((scores_K >= least - 1e-5 * abs(least)).sum() / len(rows_K))
