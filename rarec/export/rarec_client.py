"""Recommend from a folder of `rarec export --to onnx --to faiss`: `python rarec_client.py FOLDER ITEM,ITEM`."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import onnxruntime
import pyarrow.parquet as pq

try:  # the copies in an exported folder
    from rarec_order import LearnedOrder, reordered
    from rarec_scores import item_weights, part_scores, shares, table_scores
except ImportError:
    from rarec.neighbours.scores import item_weights, part_scores, shares, table_scores
    from rarec.ranking.order import LearnedOrder, reordered

BATCH = 32


class Client:
    """`Client(folder).recommend([["sku-1", "sku-7"]], k=10)`: for each history the best (id, title, score).

    Every file that it reads is checked by the sha256 in the folder's manifest.

    Args:
        folder: of the export.
        threads: that compute a query; 0 for one a core.
        graph: `query.onnx`, or `query.int8.onnx`.
        batch: histories of similar length that go through the graph together.

    Raises:
        ValueError: a file is not as it was written.
    """

    def __init__(self, folder: Path | str, threads: int = 0, graph: str = "query.onnx", batch: int = BATCH) -> None:
        self.folder = Path(folder)
        self.files = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name in ("rarec_scores.py", "rarec_order.py"):
            self.checked(name)
        self.threads, self.batch = threads, batch
        self.graph = self.session(graph)
        self.facts = json.loads(Path(self.checked("client.json")).read_text(encoding="utf-8"))
        self.index = faiss.read_index(self.checked("index.faiss"))
        self.vectors = _stored(self.index) if isinstance(self.index, faiss.IndexFlat) else None
        self.prompt, self.asked = self.facts["prompt"], self.facts["asked"]
        items = pq.read_table(self.checked("items.parquet"), columns=["id", "title"])
        self.ids, self.titles = items["id"].to_pylist(), items["title"].to_pylist()
        self.row_of = {str(item): row for row, item in enumerate(self.ids)}
        self.tables = {name: self._table(f"neighbours/{name}.parquet") for name in self.facts["neighbours"]}
        texts = pq.read_table(self.checked("titles.parquet")).combine_chunks() if self.prompt["most"] else None
        lists = {name: texts[name].chunk(0) for name in texts.column_names} if texts else {}
        self.order = LearnedOrder(**self.arrays("order.npz")) if "order.npz" in self.files else None
        self.parts = self._parts() if self.order else {}
        self.weights = item_weights(self.parts)
        for name in set(self.weights) & set(self.tables):  # which have the items' weights within, if they differ
            self.weights[name] = self.facts["neighbours"][name] * (self.weights[name] > 0)
        self.pieces = {name: (column.offsets.to_numpy(), column.values.to_numpy()) for name, column in lists.items()}

    def checked(self, name: str) -> str:
        """Return the path of a file that is as the manifest says."""
        path = self.folder / name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self.files.get(name) != digest:
            raise ValueError(f"{path} was altered: write the folder again: rarec export BUNDLE --to onnx --to faiss")
        return str(path)

    def session(self, graph: str) -> Any:
        """Return what runs a graph of the folder."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it takes half of the CPU time
        for name in self.files:
            if name.startswith(f"{graph}."):  # weights of a large graph
                self.checked(name)
        return onnxruntime.InferenceSession(self.checked(graph), options, providers=["CPUExecutionProvider"])

    def arrays(self, name: str) -> dict[str, Any]:
        """Return the arrays of a file by name."""
        with np.load(self.checked(name), allow_pickle=False) as arrays:
            return dict(arrays)

    def _parts(self) -> dict[str, Any]:
        """Return the single parts of the fusion, whose shares of a score a learned order reads."""
        own, parts = self.arrays("parts.npz"), self.facts["recommender"]["parts"]
        return {name: SimpleNamespace(**part, vectors_NZ=own.get(f"{name}/vectors")) for name, part in parts.items()}

    def _table(self, name: str) -> tuple[Any, Any, Any]:
        """Return a neighbour table by item: where the item's neighbours begin and end, all neighbours, their scores."""
        rows, neighbours, scores = (column.to_numpy() for column in pq.read_table(self.checked(name)).columns)
        return np.searchsorted(rows, np.arange(len(self.ids) + 1, dtype=rows.dtype)), neighbours, scores

    def recommend(self, histories: Any, k: int = 10) -> list[list[tuple[Any, str, float]]]:
        """Return each user's k best items, new ones alone if they were evaluated so; unknown ids are skipped."""
        known = ([self.row_of[str(item)] for item in history if str(item) in self.row_of] for history in histories)
        rows = [history[-(self.asked["max_history"] or 0) :] for history in known]
        new = self.asked["exclude_seen"]
        best = (self.best(*pair, k, pair[1] if new else []) for pair in zip(self.queries(rows), rows, strict=True))
        return [[(self.ids[row], self.titles[row], score) for row, score in items] for items in best]

    def queries(self, rows: list[list[int]]) -> Any:
        """Return query vectors, (B, K, F), after histories of item rows, of which those of a length are together."""
        prompts = [self.prompt_of(history) for history in rows]
        order = sorted(range(len(rows)), key=lambda user: (len(prompts[user][0]), len(rows[user])))
        chunks = (order[start : start + self.batch] for start in range(0, len(rows), self.batch))
        pairs = (([rows[user] for user in chunk], [prompts[user] for user in chunk]) for chunk in chunks)
        queries = [run(self.graph, self.inputs(*pair)) for pair in pairs]
        return np.concatenate(queries)[np.argsort(order)] if rows else []

    def best(self, query: Any, history: list[int], k: int, hidden: Any, among: Any = None) -> list[tuple[int, float]]:
        """Return rows and scores of a user's k best items, without the hidden ones, of all items or among some rows."""
        rows: Any = slice(None) if among is None else among
        scores = np.full(len(self.ids), -np.inf, np.float32)
        if self.order:
            scores[rows] = self.in_order(query, history)[rows]
        else:
            near = self.near(history)
            if among is None and self.vectors is None:  # of an index that finds some of the best alone
                _, found = self.index.search(query, min(self.index.ntotal, k + len(set(hidden))))
                rows = np.union1d(found[found >= 0], np.flatnonzero(near))
            vectors = self.index.reconstruct_batch(rows) if self.vectors is None else self.vectors[rows]
            # not `@`: for one user, to wake BLAS's other threads takes several times as long as this
            scores[rows] = np.einsum("nf,kf->nk", vectors, query).max(1) + near[rows]
        scores[hidden] = -np.inf
        least = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
        best = np.flatnonzero((scores >= least) & (scores > -np.inf))
        best = best[np.lexsort((best, -scores[best]))][:k]
        return list(zip(best.tolist(), scores[best].tolist(), strict=True))

    def in_order(self, query: Any, history: list[int]) -> Any:
        """Return the score of each item where the best are in a learned order, (N,)."""
        scores = part_scores(self.parts, self.tables, query, history, self.facts["newest"], self.facts["decay"])
        return reordered(self.order, shares(self.weights, scores), history, exclude_seen=self.asked["exclude_seen"])

    def near(self, history: list[int]) -> Any:
        """Return what the neighbour tables add to the score of each item, (N,)."""
        added = np.zeros(len(self.ids), np.float32)
        for name, weight in self.facts["neighbours"].items():
            added += weight * table_scores(self.tables[name], history, self.facts["newest"], self.facts["decay"])
        return added

    def inputs(self, rows: list[list[int]], prompts: Any = ()) -> dict[str, Any]:
        """Return the graph's inputs after histories of item rows, whose prompts may be there already."""
        texts, slots, titles = zip(*(prompts or map(self.prompt_of, rows)), strict=True)
        longest = {"history": (rows, 1), "input_ids": (texts, max(map(len, texts)) + 1), "slot_positions": (slots, 0)}
        given = {}
        for name, (lists, least) in {**longest, "titles": (titles, self.prompt["most"])}.items():
            width = max([least, *map(len, lists)])
            given[name] = np.array([[*own, *[-1] * (width - len(own))] for own in lists], np.int64)
        return given

    def prompt_of(self, history: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Return token ids, the index of each slot (-1 for those that the history lacks), the items of the titles."""
        prompt = self.prompt
        wanted = history[::-1][: prompt["most"]]
        ids = list(prompt["empty"])
        slots = dict(prompt["empty_slots"])
        items = []
        if wanted:
            later, first = (np.array([len(self._piece(name, row)) for row in wanted]) for name in ("later", "first"))
            saved = (later - first)[0] if prompt["newest_first"] else later - first
            items = wanted[: max(1, int((np.cumsum(later) - saved <= prompt["room"]).sum()))]
            items = items if prompt["newest_first"] else items[::-1]
            ids = list(prompt["before"])
            slots = dict(prompt["before_slots"])
            for number, row in enumerate(items):
                name = "later" if number else "first"
                inside = zip(prompt["titles_first"], self._piece(f"{name}_slots", row), strict=True)
                slots |= {place + number: len(ids) + index for place, index in inside}
                ids += self._piece(name, row).tolist()
            bare = len(ids) - len(prompt["before"]) == len(slots) - len(prompt["before_slots"])  # no title has a word
            slots |= {place: len(ids) + index for place, index in prompt["after_slots"]}
            ids += prompt["bare_after" if bare else "after"]
        return ids, [slots.get(place, -1) for place in range(prompt["count"])], items

    def _piece(self, name: str, row: int) -> Any:
        """Return the tokens, or the indices of the slots, of an item's title."""
        starts, values = self.pieces[name]
        return values[starts[row] : starts[row + 1]]


def run(session: Any, given: dict[str, Any]) -> Any:
    """Return the output of a graph, which takes some of the inputs."""
    return session.run(None, {own.name: given[own.name] for own in session.get_inputs()})[0]


def _stored(index: Any) -> Any:
    """Return the vectors of a flat index, (N, F), which stay in it."""
    return faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)


if __name__ == "__main__":
    best = Client(sys.argv[1]).recommend([sys.argv[2].split(",")])[0]
    print("\n".join("{}\t{}\t{:.4f}".format(*item) for item in best))
