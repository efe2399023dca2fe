"""What a service tells those who run it: events, one JSON line each on standard error, and metrics for Prometheus."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from rarec.console.inert import inert

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable of the environment that prometheus_client reads: where worker processes write their metrics."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHARES = tuple(tenth / 10 for tenth in range(11))
OF_BUNDLE = ("bundle", "version")


def event(kind: str, text: str | None = None, /, **fields: Any) -> None:
    """Write one line of JSON to standard error; a log that cannot be written ends no service."""
    said = {"text": inert(text)} if text is not None else {}
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **said, **fields}
    with suppress(OSError, ValueError):
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()


class Metrics:
    """What a service counts, in Prometheus's form; the counts of several worker processes are added up."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        own = CollectorRegistry()
        self._registry = own
        if os.environ.get(FOLDER):
            self._registry = CollectorRegistry()
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]

        def histogram(name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"rarec_{name}", text, labels, buckets=buckets, registry=own)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"rarec_{name}", text, labels, registry=own)

        self.requests = counter("requests", "Requests.", "method", "route", "status")
        self.refused = counter("refused", "Requests that were refused.", "reason")
        self.seconds = histogram("request_seconds", "Time of a request, from its first byte.", ("route",), SECONDS)
        self.users = histogram("batch_users", "Users of a pass of the model.", OF_BUNDLE, USERS)
        self.queue = histogram("queue_seconds", "Time that a request waits for its pass.", OF_BUNDLE, SECONDS)
        self.compute = histogram("compute_seconds", "Time of a pass of the model.", OF_BUNDLE, SECONDS)
        self.waiting = Gauge("rarec_waiting_users", "Users who wait.", registry=own, multiprocess_mode="livesum")
        self.serves = Gauge(
            "rarec_bundle_serves", "1 for what serves.", OF_BUNDLE, registry=own, multiprocess_mode="livemax"
        )
        self.bundles = counter("bundles", "Bundles loaded and refused.", "event")
        self.impressions = counter("impressions", "Lists noted as shown, and lost.", "outcome")
        self.shadow = counter("shadow", "Requests to the shadow.", "outcome")
        self.overlap = histogram("shadow_overlap", "Items that answer and shadow share.", OF_BUNDLE, SHARES)

        self._early = self.requests.labels("other", "other", "503"), self.refused.labels("overload")

    def request(self, method: str, route: str, status: int, seconds: float, refused: str | None = None) -> None:
        """Count a request, and why it was refused."""
        self.requests.labels(method if method in ("GET", "POST", "HEAD") else "other", route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)
        if refused:
            self.refused.labels(refused).inc()

    def refuse_early(self) -> None:
        """Count a request that is refused before anything is known of it."""
        self._early[0].inc()
        self._early[1].inc()

    def observer(self, name: str, version: str) -> Callable[[int, list[float], float], None]:
        """Return what counts the passes of a bundle: their users, how long each request waited, how long they took."""
        of_users, of_queue, of_compute = (each.labels(name, version) for each in (self.users, self.queue, self.compute))

        def observe(users: int, waited: list[float], seconds: float) -> None:
            of_users.observe(users)
            of_compute.observe(seconds)
            for each in waited:
                of_queue.observe(each)

        return observe

    def bundle(self, kind: str, text: str) -> None:
        """Count what happened to a bundle, and write it as an event."""
        self.bundles.labels(kind).inc()
        event(kind, text)

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        if os.environ.get(FOLDER):
            forget_ended_workers(Path(os.environ[FOLDER]))
        return generate_latest(self._registry)


def forget_ended_workers(folder: Path) -> None:
    """Drop the gauges of worker processes that have ended: nobody waits in them. Linux only."""
    for file in folder.glob("gauge_live*_*.db"):
        worker = file.stem.rpartition("_")[2]
        if Path("/proc").exists() and not Path("/proc", worker).exists():
            file.unlink(missing_ok=True)  # another worker may have answered at the same time
