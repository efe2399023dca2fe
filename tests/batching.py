"""Engines whose passes take as long as a test wants."""

import threading
import time
from typing import Any

from rarec.bundle.recommended import Recommended, Request
from rarec.errors import UserError
from rarec.serve.engines import Answer


class Slow:
    """An engine whose passes wait until they may."""

    row, version, ids, titles = "slow", "0" * 64, [], []

    def __init__(self) -> None:
        self.go, self.passes = threading.Event(), list[list[Any]]()

    def answer(self, requests: list[Request]) -> list[Answer]:
        self.go.wait(10)
        self.passes.append([request.history for request in requests])
        if any("bad" in request.history for request in requests):
            raise UserError("bad", "leave it out")
        return [Answer([Recommended(str(request.history[0]), "", 0.0)], 0) for request in requests]


class Timed(Slow):
    """An engine that takes its time for each user."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.go.set()

    def answer(self, requests: list[Request]) -> list[Answer]:
        time.sleep(self.seconds * len(requests))
        return super().answer(requests)
