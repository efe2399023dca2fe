"""Recommend from a folder of `rarec export --to onnx --to faiss`: `python rarec_client.py FOLDER ITEM,ITEM`."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnxruntime
import pyarrow.parquet as pq

try:
    from rarec_scores import newest_first, score  # the copy in an exported folder
except ImportError:
    from rarec.neighbours.scores import newest_first, score


class Client:
    """`Client(folder).recommend([["sku-1", "sku-7"]], k=10)`: for each history the best new (id, title, score).

    Every file that it reads is checked by the sha256 in the folder's manifest.

    Raises:
        ValueError: a file is not as it was written.
    """

    def __init__(self, folder: Path | str, threads: int = 0, graph: str = "query.onnx") -> None:
        self.folder = Path(folder)
        self.files = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        if "rarec_scores.py" in self.files:  # earlier exports have none
            self._checked("rarec_scores.py")
        self.threads = threads
        self.graph = self._session(graph)
        self.facts = json.loads(Path(self._checked("client.json")).read_text(encoding="utf-8"))
        self.index = faiss.read_index(self._checked("index.faiss"))
        self.prompt = self.facts["prompt"]
        items = pq.read_table(self._checked("items.parquet"), columns=["id", "title"])
        self.ids, self.titles = items["id"].to_pylist(), items["title"].to_pylist()
        self.row_of = {str(item): row for row, item in enumerate(self.ids)}
        tables = {name: pq.read_table(self._checked(f"neighbours/{name}.parquet")) for name in self.facts["neighbours"]}
        self.near = {name: [part.to_numpy() for part in table.columns] for name, table in tables.items()}
        texts = pq.read_table(self._checked("titles.parquet")).combine_chunks() if self.prompt["most"] else None
        self.pieces = {name: texts[name].chunk(0) for name in texts.column_names} if texts else {}

    def _checked(self, name: str) -> str:
        """Return the path of a file that is as the manifest says."""
        path = self.folder / name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self.files.get(name) != digest:
            raise ValueError(f"{path} was altered: write the folder again: rarec export BUNDLE --to onnx --to faiss")
        return str(path)

    def _session(self, graph: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        for name in self.files:
            if name.startswith(f"{graph}."):  # weights of a large graph
                self._checked(name)
        return onnxruntime.InferenceSession(self._checked(graph), options, providers=["CPUExecutionProvider"])

    def recommend(self, histories: Any, k: int = 10) -> list[list[tuple[Any, str, float]]]:
        """Return each user's k best new items; ids that are not in the catalogue are skipped."""
        rows = [[self.row_of[str(item)] for item in history if str(item) in self.row_of] for history in histories]
        best = (self.best(query, history, k, history) for query, history in zip(self.queries(rows), rows, strict=True))
        return [[(self.ids[row], self.titles[row], score) for row, score in items] for items in best]

    def queries(self, rows: list[list[int]]) -> Any:
        """Return query vectors, (B, K, F), after histories of item rows."""
        given = dict(self._inputs(rows))
        return self.graph.run(None, {own.name: given[own.name] for own in self.graph.get_inputs()})[0]

    def best(self, query: Any, history: list[int], k: int, hidden: Any, among: Any = None) -> list[tuple[int, float]]:
        """Return rows and scores of a user's k best items, without the hidden ones, of all items or among some rows."""
        added = np.zeros(len(self.ids))
        items, factors, _ = newest_first([history], self.facts["newest"], self.facts["decay"])
        for name, weight in self.facts["neighbours"].items():
            rows, columns, values = self.near[name]
            sums = np.zeros(len(self.ids))
            for item, factor in zip(items, factors.tolist(), strict=True):
                part = slice(*np.searchsorted(rows, [item, item + 1]))
                sums[columns[part]] += factor * values[part]
            added += weight * score(sums)
        if among is None:
            _, found = self.index.search(query, min(self.index.ntotal, k + len(set(hidden))))
            among = np.union1d(found[found >= 0], np.flatnonzero(added))
        rows = np.setdiff1d(among, hidden)
        scores = (self.index.reconstruct_batch(rows) @ query.T).max(1) + added[rows] if len(rows) else rows
        return [(int(row), -float(score)) for score, row in sorted(zip(-scores, rows, strict=True))[:k]]

    def _inputs(self, rows: list[list[int]]) -> Any:
        texts, slots, titles = zip(*map(self._prompt, rows), strict=True)
        longest = {"history": (rows, 1), "input_ids": (texts, max(map(len, texts)) + 1), "slot_positions": (slots, 0)}
        for name, (lists, least) in {**longest, "titles": (titles, self.prompt["most"])}.items():
            width = max([least, *map(len, lists)])
            yield name, np.array([[*own, *[-1] * (width - len(own))] for own in lists], np.int64)

    def _prompt(self, history: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Return token ids, the index of each slot (-1 for those that the history lacks), the items of the titles."""
        prompt = self.prompt
        wanted = history[::-1][: self.prompt["most"]]
        ids = list(prompt["empty"])
        slots = prompt["empty_slots"]
        items = []
        if wanted:
            later, first = (np.array([len(self.pieces[name][row]) for row in wanted]) for name in ("later", "first"))
            saved = (later - first)[0] if prompt["newest_first"] else later - first
            items = wanted[: max(1, int((np.cumsum(later) - saved <= prompt["room"]).sum()))]
            items = items if prompt["newest_first"] else items[::-1]
            ids = list(prompt["before"])
            slots = prompt["before_slots"]
            for number, row in enumerate(items):
                name = "later" if number else "first"
                inside = zip(prompt["titles_first"], self.pieces[f"{name}_slots"][row].as_py(), strict=True)
                slots = slots + [[place + number, len(ids) + index] for place, index in inside]
                ids += self.pieces[name][row].as_py()
            bare = len(ids) - len(prompt["before"]) == len(slots) - len(prompt["before_slots"])  # no title has a word
            after = prompt["bare_after" if bare else "after"]
            slots = slots + [[place, len(ids) + index] for place, index in prompt["after_slots"]]
            ids = ids + after
        return ids, [dict(slots).get(place, -1) for place in range(prompt["count"])], items


if __name__ == "__main__":
    best = Client(sys.argv[1]).recommend([sys.argv[2].split(",")])[0]
    print("\n".join("{}\t{}\t{:.4f}".format(*item) for item in best))
