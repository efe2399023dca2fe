"""Metrics of a service, in Prometheus's form; those of several worker processes are added up."""

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable of the environment that prometheus_client reads: where worker processes write their metrics."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """What a service counts."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        own = CollectorRegistry()
        self._registry = own
        if os.environ.get(FOLDER):
            self._registry = CollectorRegistry()
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        self.requests = Counter("rarec_requests", "Requests.", ("method", "route", "status"), registry=own)
        self.seconds = Histogram(
            "rarec_request_seconds", "Time of a request.", ("route",), buckets=SECONDS, registry=own
        )
        self.batch = Histogram("rarec_batch_users", "Users of a pass of the model.", buckets=USERS, registry=own)
        self.waiting = Gauge("rarec_waiting_users", "Users who wait.", registry=own, multiprocess_mode="livesum")
        self.events = Counter("rarec_bundles", "Bundles loaded and refused.", ("event",), registry=own)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(method if method in ("GET", "POST", "HEAD") else "other", route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        if os.environ.get(FOLDER):
            _forget_dead_workers(Path(os.environ[FOLDER]))
        return generate_latest(self._registry)


def _forget_dead_workers(folder: Path) -> None:
    """Drop the gauges of worker processes that have ended: nobody waits in them. Linux only."""
    for file in folder.glob("gauge_livesum_*.db"):
        worker = file.stem.rpartition("_")[2]
        if Path("/proc").exists() and not Path("/proc", worker).exists():
            file.unlink(missing_ok=True)  # another worker may have answered at the same time
