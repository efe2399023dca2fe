"""The shadow: a bundle that is asked beside those that answer, when nothing else waits, and compared with them."""

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from rarec.bundle.recommended import Request
from rarec.serve.batcher import Answer, Busy, Closed
from rarec.serve.bundle_manager import BundleManager, Loaded
from rarec.serve.telemetry import Metrics


class Shadow:
    """Asks the shadow for a share of what is asked.

    Args:
        manager: the bundles.
        metrics: of the process: what was asked, and how much of the lists is the same.
    """

    def __init__(self, manager: BundleManager, metrics: Metrics) -> None:
        self._manager, self._metrics = manager, metrics

    def ask(self, answered: Loaded, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """Compare answers that were given with those of the shadow: later, if at all."""
        settings = self._manager.settings
        shadow = settings.shadow
        if shadow is None or answered.name == shadow.bundle or random.random() >= shadow.share:
            return
        loaded = self._manager.idle(shadow.bundle)
        try:
            if loaded is None:
                raise Closed
            future = loaded.batcher.answer(requests, time.monotonic() + settings.timeout)
        except (Busy, Closed):
            self._metrics.shadow.labels("dropped").inc()
            return
        future.add_done_callback(partial(self._compare, loaded, answers))

    def _compare(self, loaded: Loaded, answers: Sequence[Answer], future: "Future[list[Answer]]") -> None:
        if future.cancelled() or future.exception():
            self._metrics.shadow.labels("failed").inc()
            return
        self._metrics.shadow.labels("asked").inc()
        overlap = self._metrics.overlap.labels(*loaded.source.values())
        for given, other in zip(answers, future.result(), strict=True):
            overlap.observe(overlap_of(given, other))


def overlap_of(one: Answer, other: Answer) -> float:
    """Return the share of items that two lists have in common, of the longer one; 1 for two empty ones."""
    items = [{item.item for item in answer.items} for answer in (one, other)]
    longest = max(map(len, items))
    return len(items[0] & items[1]) / longest if longest else 1.0
