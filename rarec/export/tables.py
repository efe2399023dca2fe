"""`--to vectors`: items with their vectors, neighbour tables, facts; for a vector database, an index, a client."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rarec.bundle.bundle import TABLES
from rarec.bundle.parts import Parts
from rarec.data.tables import write_rows
from rarec.neighbours.table import SCHEMA, pairs_of
from rarec.storage.files import write_json

ITEMS, FACTS = "items.parquet", "client.json"


def write_tables(parts: Parts, directory: Path) -> dict[str, Any]:
    """Write `items.parquet`, the neighbour tables and `client.json`; return figures.

    `items.parquet` has a row for each item: `id`, `values` (its vector), `title`, `text`, `train_count`. The score of
    a user and an item is the inner product of the user's `Recommender.query_vectors` and `values`, plus what the
    neighbour tables add.
    """
    form, catalogue = parts.dense, parts.bundle.catalogue
    size = form.items_NF.shape[1]
    values = pa.FixedSizeListArray.from_arrays(pa.array(form.items_NF.ravel()), size)
    columns = {"id": catalogue.ids, "values": values, "title": catalogue.titles, "text": catalogue.texts}
    pq.write_table(pa.table({**columns, "train_count": catalogue.counts_N}), directory / ITEMS, compression="zstd")
    for name, (ranker, _) in form.sparse.items():
        (directory / TABLES).mkdir(exist_ok=True)
        write_rows([pairs_of(ranker.table_NN)], directory / TABLES / f"{name}.parquet", SCHEMA)
    rule = parts.bundle.facts["neighbours"] or {}
    facts = {
        "row": parts.bundle.facts["row"],
        "items": len(catalogue.titles),
        "dim": size,
        "neighbours": {name: float(weight) for name, (_, weight) in form.sparse.items()},
        "newest": rule.get("newest", 0),
        "decay": rule.get("decay", 1.0),
    }
    write_json(directory / FACTS, facts)
    return facts
