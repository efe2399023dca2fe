"""Recommendations on Spark, on a cluster of CPUs: the ONNX query graph and the client, in every worker.

```python
from rarec.export.spark import recommend

rows = spark.read.parquet(log).select("user", "item", "time", "_metadata.file_path", "_metadata.row_index")
ordered = F.array_sort(F.collect_list(F.struct("time", "file_path", "row_index", "item"))).getField("item")
histories = rows.groupBy("user").agg(ordered.alias("items"))
recommend(histories, served, k=10).write.parquet(top)
```

So events of one time keep the order of the log's files and rows, as in `rarec recommend --all`.
"""

import hashlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rarec.errors import UserError
from rarec.export import KIND
from rarec.storage.artefacts import check_files, read_manifest

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

MANIFEST = "manifest.json"
NEEDED = ("query.onnx", "index.faiss", "client.json", "rarec_client.py", MANIFEST)
_SENT: dict[tuple[str, str], tempfile.TemporaryDirectory[str]] = {}
"""Copies of folders that were sent, by application and name."""


def recommend(
    histories: "DataFrame",
    folder: Path | str,
    k: int = 10,
    *,
    user: str = "user",
    items: str = "items",
    graph: str = "query.onnx",
) -> "DataFrame":
    """Return the k best new items of every user: columns `user`, `rank` (from 1), `item`, `title`, `score`.

    Workers need onnxruntime, faiss-cpu, numpy and pyarrow, neither torch nor rarec: the folder is sent to them with its
    client, and each Python worker opens it once. On a cluster, PYSPARK_PYTHON names a Python that has these.

    Args:
        histories: a row for each user.
        folder: of `rarec export BUNDLE --to onnx --to faiss`.
        k: number of items.
        user: column of the user.
        items: column of the history, an array of item ids, oldest first.
        graph: the graph in the folder: `query.onnx`, or `query.int8.onnx`.

    Raises:
        UserError: the folder is not such a one; a column is missing, or of another type.
    """
    from pyspark import SparkFiles
    from pyspark.cloudpickle import register_pickle_by_value
    from pyspark.sql import types as T

    folder = Path(folder).absolute()
    remedy = f"write the folder: rarec export BUNDLE --to onnx --to faiss --out {folder.name}"
    missing = [name for name in (*NEEDED, graph) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {missing[0]}", remedy)
    check_files(folder, read_manifest(folder, KIND), remedy)
    types = {field.name: field.dataType for field in histories.schema.fields}
    if user not in types or not isinstance(types.get(items), T.ArrayType):
        columns = ", ".join(f"{name} {kind.simpleString()}" for name, kind in types.items())
        problem = f"the histories lack a column {user!r} or a column {items!r} of arrays ({columns})"
        raise UserError(problem, "name the columns: recommend(histories, folder, user=..., items=...)")
    context = histories.sparkSession.sparkContext
    if context.pythonExec == "python3" and str(context.master).startswith("local"):
        context.pythonExec = sys.executable  # another Python of this machine may lack what workers need
    name = _sent(context, folder)
    by_value: Any = register_pickle_by_value
    by_value(sys.modules[__name__])  # workers may have no rarec
    is_integer = pa.types.is_integer(pq.read_schema(folder / "items.parquet").field("id").type)
    item = "bigint" if is_integer else "string"
    schema = f"`user` {types[user].simpleString()}, `rank` int, `item` {item}, `title` string, `score` float"

    def serve(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        client = _client(SparkFiles.get(name), graph)
        for batch in batches:
            yield from _served(client, batch, k)

    return histories.select(user, items).mapInArrow(serve, schema)


def _sent(context: Any, folder: Path) -> str:
    """Send a folder to the workers; return its name there.

    Spark sends a path once in a session, and workers keep what they have opened. So a copy is sent, whose name holds a
    digest of the folder's manifest. It lasts as long as this process.
    """
    manifest = (folder / MANIFEST).read_bytes()
    name = f"{folder.name}-{hashlib.sha256(manifest).hexdigest()[:12]}"
    if (context.applicationId, name) not in _SENT:
        place = tempfile.TemporaryDirectory(prefix="rarec-")
        context.addFile(str(shutil.copytree(folder, Path(place.name, name))), recursive=True)
        _SENT[context.applicationId, name] = place
    return name


def _client(folder: str, graph: str) -> Any:
    """Open the folder with the client that is in it, once in a worker: a task gets a new copy of this module."""
    name = f"rarec_client {folder} {graph}"
    if name not in sys.modules:
        spec: Any = importlib.util.spec_from_file_location(name, Path(folder, "rarec_client.py"))
        sys.path.append(folder)  # of what the client imports
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.client = module.Client(folder, threads=1, graph=graph)
        sys.modules[name] = module
    return sys.modules[name].client


def _served(client: Any, batch: pa.RecordBatch, k: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a batch's users."""
    users, histories = batch.columns
    lists = client.recommend([history or [] for history in histories.to_pylist()], k)
    rows = [(place, rank, *item) for place, items in enumerate(lists) for rank, item in enumerate(items, 1)]
    if rows:
        places, ranks, ids, titles, scores = zip(*rows)  # noqa: B905
        columns = [users.take(pa.array(places)), pa.array(ranks, pa.int32()), pa.array(ids), pa.array(titles)]
        names = ["user", "rank", "item", "title", "score"]
        yield pa.RecordBatch.from_arrays([*columns, pa.array(scores, pa.float32())], names)
