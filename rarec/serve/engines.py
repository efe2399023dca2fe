"""What answers a service's requests: a bundle's model in PyTorch, or in ONNX Runtime."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rarec.bundle.recommended import Explanation, History, Id, Place, Recommended, Request
from rarec.errors import UserError
from rarec.serve.settings import ServeSettings
from rarec.storage.artefacts import Manifest, check_files, read_manifest

CHUNK = 32
"""Histories of about the same length that go through the graph together."""
AGAIN = "write it again: rarec export BUNDLE --to onnx --to faiss"


class Answer(NamedTuple):
    """What one user gets: items, best first, and how many ids of the history the catalogue lacks."""

    items: list[Recommended]
    unknown: int


class NotOffered(Exception):
    """This backend cannot do it."""


class Engine:
    """A bundle's model. Calls do not overlap.

    Attributes:
        row: name of the row that is served.
        version: hash of the bundle's manifest.
        ids: of the catalogue.
        titles: of the catalogue.
    """

    row: str
    version: str
    ids: Sequence[Id]
    titles: Sequence[str]

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Recommend. Raises `UserError` where a request names an item that is not in the catalogue."""
        raise NotOffered("recommendations")

    def vectors(self, histories: Sequence[History]) -> list[Any]:
        """Return query vectors, (B, F) or (B, K, F), as lists."""
        raise NotOffered("vectors")

    def similar(self, item: Id, k: int) -> list[Recommended]:
        """Return the items most like one."""
        raise NotOffered("similar items")

    def explain(self, history: History, item: Id) -> Explanation:
        """Return the evidence for an item."""
        raise NotOffered("explanations")

    def compare(self, history: History, k: int) -> dict[str, list[Recommended]]:
        """Return the best new items by each part of the row alone, by the part's title."""
        raise NotOffered("single parts")

    def sample(self) -> list[tuple[Id, str]]:
        """Return the history of a user who might be, ids and titles."""
        raise NotOffered("sample users")

    def place(self, history: History, title: str, text: str, k: int) -> Place:
        """Return the place of a new item in a user's ranking."""
        raise NotOffered("new items")


class TorchEngine(Engine):
    """A bundle whose model runs in PyTorch.

    Args:
        path: of the bundle.
        settings: of the service: device, language model, trusted parts.

    Raises:
        UserError: the bundle is missing or damaged.
    """

    def __init__(self, path: Path, settings: ServeSettings) -> None:
        from rarec.bundle.bundle import Bundle
        from rarec.bundle.recommender import Recommender

        bundle = Bundle.open(path, settings.trusted)
        self._recommender = Recommender(bundle, device=settings.device, llm=settings.llm)
        self.row = str(bundle.facts["row"])
        self.version = str(bundle.manifest["hash"])
        self.ids = self._recommender.items
        self.titles = bundle.catalogue.titles
        self._recommender.recommend([self.ids[:1]], 1)  # so that the first request does not wait for the model to load
        self._keep_in_memory()

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Engine`."""
        answers = self._recommender.answer(requests)
        return list(map(Answer, answers.items, answers.unknown))

    def vectors(self, histories: Sequence[History]) -> list[Any]:
        """See `Engine`."""
        vectors: list[Any] = self._recommender.query_vectors(histories).tolist()
        return vectors

    def similar(self, item: Id, k: int) -> list[Recommended]:
        """See `Engine`."""
        return self._recommender.similar(item, k)

    def explain(self, history: History, item: Id) -> Explanation:
        """See `Engine`."""
        return self._recommender.explain(history, item)

    def compare(self, history: History, k: int) -> dict[str, list[Recommended]]:
        """See `Engine`."""
        return self._recommender.compare(history, k)

    def sample(self) -> list[tuple[Id, str]]:
        """See `Engine`."""
        from rarec.bundle.parts import sample_user

        rows = sample_user(self._recommender.parts, np.random.default_rng())
        return [(self.ids[row], self.titles[row]) for row in rows]

    def place(self, history: History, title: str, text: str, k: int) -> Place:
        """See `Engine`."""
        return self._recommender.place(history, title, text, k)

    def _keep_in_memory(self) -> None:
        """Copy what is mapped from files: one that is cut short on the disk would end the process."""
        parts = self._recommender.parts
        if parts.bundle.facts["model"]:
            for tensor in (*parts.encoder.model.parameters(), *parts.encoder.model.buffers()):
                tensor.data = tensor.data.clone()


class OnnxEngine(Engine):
    """A bundle whose model runs in ONNX Runtime: neither torch nor the language model's folder is needed.

    Args:
        folder: of `rarec export BUNDLE --to onnx --to faiss`.
        threads: of ONNX Runtime; 0 takes all cores.

    Raises:
        UserError: it is missing, damaged, or lacks a form.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        manifest = check_served(folder)
        self._client = import_module("rarec.export.rarec_client").Client(folder, threads)
        self.row = str(manifest["settings"]["row"])
        self.version = str(manifest["hash"])
        self.ids: list[Id] = self._client.ids
        self.titles: list[str] = self._client.titles

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Engine`."""
        rows = [self._rows(request.history) for request in requests]
        answers: dict[int, Answer] = {}
        by_length = sorted(range(len(requests)), key=lambda user: len(rows[user]))
        for start in range(0, len(by_length), CHUNK):
            chunk = by_length[start : start + CHUNK]
            for user, query in zip(chunk, self._client.queries([rows[user] for user in chunk]), strict=True):
                answers[user] = self._answer(requests[user], rows[user], query)
        return [answers[user] for user in range(len(requests))]

    def vectors(self, histories: Sequence[History]) -> list[Any]:
        """See `Engine`."""
        queries = self._client.queries([self._rows(history) for history in histories])
        return [(query[0] if len(query) == 1 else query).tolist() for query in queries]

    def _answer(self, request: Request, rows: list[int], query: Any) -> Answer:
        if request.popular_if_empty and not rows:
            raise NotOffered("popular_if_empty")
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


def load_engine(settings: ServeSettings, path: Path) -> Engine:
    """Open the engine of a bundle.

    Raises:
        UserError: it is missing or damaged.
    """
    return OnnxEngine(path) if settings.backend == "onnx" else TorchEngine(path, settings)


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
