"""A bundle whose model runs in PyTorch."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rarec.bundle.bundle import Bundle
from rarec.bundle.parts import sample_user
from rarec.bundle.recommended import Explanation, History, Id, Place, Recommended, Request
from rarec.bundle.recommender import Recommender
from rarec.serve.engine import Answer


class TorchEngine:
    """See `Engine`.

    Args:
        bundle: an opened bundle.
        device: see `Recommender`.
        llm: see `Recommender`.
    """

    def __init__(self, bundle: Bundle, device: str = "auto", llm: str | None = None) -> None:
        self._recommender = Recommender(bundle, device=device, llm=llm)
        self.row, self.version = str(bundle.facts["row"]), str(bundle.manifest["hash"])
        self.ids, self.titles = self._recommender.items, bundle.catalogue.titles
        self._recommender.recommend([self.ids[:1]], 1)  # the first request shall not wait for the model to load
        self._keep_in_memory()

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Engine`."""
        found = self._recommender.answer(requests)
        return list(map(Answer, found.items, found.unknown))

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
