"""A bundle whose model runs in ONNX Runtime: neither torch nor the language model's folder is needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rarec.bundle.recommended import Explanation, History, Id, Place, Recommended, Request
from rarec.errors import UserError
from rarec.export.rarec_client import Client
from rarec.serve.engine import Answer, NotOffered
from rarec.storage.artefacts import Manifest, check_files, read_manifest

CHUNK = 32
"""Histories of about the same length that go through the graph together."""
AGAIN = "write it again: rarec export BUNDLE --to onnx --to faiss"


class OnnxEngine:
    """See `Engine`.

    Args:
        folder: of `rarec export BUNDLE --to onnx --to faiss`.
        threads: of ONNX Runtime; 0 takes all cores.

    Raises:
        UserError: it is missing, damaged, or lacks a form.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        manifest = check_served(folder)
        self._client = Client(folder, threads)
        self.row, self.version = str(manifest["settings"]["row"]), str(manifest["hash"])
        self.ids: list[Id] = self._client.ids
        self.titles: list[str] = self._client.titles

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Engine`."""
        rows, found = [self._rows(request.history) for request in requests], dict[int, Answer]()
        order = sorted(range(len(requests)), key=lambda at: len(rows[at]))
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            for at, query in zip(chunk, self._client.queries([rows[at] for at in chunk]), strict=True):
                found[at] = self._answer(requests[at], rows[at], query)
        return [found[at] for at in range(len(requests))]

    def vectors(self, histories: Sequence[History]) -> list[Any]:
        """See `Engine`."""
        queries = self._client.queries([self._rows(history) for history in histories])
        return [(query[0] if len(query) == 1 else query).tolist() for query in queries]

    def similar(self, item: Id, k: int) -> list[Recommended]:
        """See `Engine`."""
        raise NotOffered("similar items are not offered by ONNX Runtime")

    def explain(self, history: History, item: Id) -> Explanation:
        """See `Engine`."""
        raise NotOffered("explanations are not offered by ONNX Runtime")

    def compare(self, history: History, k: int) -> dict[str, list[Recommended]]:
        """See `Engine`."""
        raise NotOffered("single parts are not offered by ONNX Runtime")

    def sample(self) -> list[tuple[Id, str]]:
        """See `Engine`."""
        raise NotOffered("sample users are not offered by ONNX Runtime")

    def place(self, history: History, title: str, text: str, k: int) -> Place:
        """See `Engine`."""
        raise NotOffered("new items are not offered by ONNX Runtime")

    def _answer(self, request: Request, rows: list[int], query: Any) -> Answer:
        if request.popular_if_empty and not rows:
            raise NotOffered("popular_if_empty is not offered by ONNX Runtime")
        hidden = np.union1d(self._known(request.deny), rows if request.exclude_seen else []).astype(np.int64)
        allowed = None if request.allow is None else self._known(request.allow)
        best = self._client.best(query, rows, request.k, hidden, allowed)
        items = [Recommended(self.ids[row], self.titles[row], score) for row, score in best]
        return Answer(items, len(request.history) - len(rows))

    def _rows(self, history: History) -> list[int]:
        row_of = self._client.row_of
        return [row_of[str(item)] for item in history if str(item) in row_of]

    def _known(self, items: Any) -> Any:
        rows = [self._client.row_of.get(str(item)) for item in items]
        for item, row in zip(items, rows, strict=True):
            if row is None:
                raise UserError(f"item {item!r} is not in the catalogue", "leave it out")
        return np.array(rows, np.int64)


def check_served(folder: Path) -> Manifest:
    """Check the files of a folder; return its manifest.

    Raises:
        UserError: it is missing, damaged, or lacks a form.
    """
    try:
        manifest = read_manifest(folder, "served")
    except UserError as error:
        raise UserError(error.problem, AGAIN) from None
    check_files(folder, manifest, AGAIN)
    if not {"onnx", "faiss"} <= set(manifest["settings"]["formats"]):
        raise UserError(f"{folder} lacks ONNX or faiss", AGAIN)
    return manifest
