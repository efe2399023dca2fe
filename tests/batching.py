"""Recommenders whose passes take as long as a test wants."""

import threading
import time
from types import SimpleNamespace
from typing import Any

from rarec.bundle.recommended import Recommendations, Recommended, Request
from rarec.errors import UserError


class Slow:
    """A recommender whose passes wait until they may."""

    row, items, catalogue = "slow", [], SimpleNamespace(titles=[])

    def __init__(self) -> None:
        self.go, self.passes = threading.Event(), list[list[Any]]()

    def answer(self, requests: list[Request]) -> Recommendations:
        self.go.wait(10)
        self.passes.append([request.history for request in requests])
        if any("bad" in request.history for request in requests):
            raise UserError("bad", "leave it out")
        lists = [[Recommended(str(request.history[0]), "", 0.0)] for request in requests]
        return Recommendations(lists, [0] * len(lists), [[]] * len(lists))


class Timed(Slow):
    """A recommender that takes its time for each user."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.go.set()

    def answer(self, requests: list[Request]) -> Recommendations:
        time.sleep(self.seconds * len(requests))
        return super().answer(requests)
