"""What stands before every request: tokens, rates, limits of size and time, safe headers, the access log, metrics."""

import asyncio
import hashlib
import hmac
import json
import os
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rarec.console.inert import inert
from rarec.errors import UserError
from rarec.serve.settings import LOOPBACK, ServeSettings, host_name

OPEN = ("/health", "/ready", "/", "/page.js", "/page.css")
"""Paths that need no token: they tell nothing of a bundle's items."""
CLIENTS = 10_000
"""Clients whose rate is remembered."""
BURST = 2.0
"""Seconds of its rate that a client may use at once."""
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable of the environment that prometheus_client reads: where worker processes write their metrics."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
REMEDIES = {408: "send it at once", 413: "send less at a time"}
PATIENCE = 10.0
"""Seconds in which a client must have sent a request's headers, or read a part of an answer; an idle one's as well."""
SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


class Current(Protocol):
    """What applies now: settings may change while a service runs."""

    settings: ServeSettings
    tokens: list[bytes] | None

    @property
    def waiting(self) -> int:
        """Return the number of users who wait."""


class Guard:
    """Wraps the application.

    Args:
        app: the application.
        current: has the settings and the hashes of the tokens as they are now.
        metrics: of the process.
    """

    def __init__(self, app: ASGIApp, current: Current, metrics: "Metrics") -> None:
        self._app, self._current, self._metrics = app, current, metrics
        self._rates = Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, and write a line of the access log: without any history, item, user or token."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        note: dict[str, Any] = {"id": uuid.uuid4().hex, "status": 0, "bytes": 0}
        scope["rarec"] = note

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                note["status"] = message["status"]
                MutableHeaders(scope=message).update({**SAFE, "x-request-id": note["id"]})
            note["bytes"] += len(message.get("body", b""))
            await asyncio.wait_for(send(message), PATIENCE)

        try:
            await self._serve(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(scope["method"], route, note["status"], seconds)
            self._metrics.waiting.set(self._current.waiting)  # also where another worker is asked for the metrics
            event("request", None, method=scope["method"], route=route, ms=round(1000 * seconds, 1), **note)

    async def _serve(self, scope: Scope, receive: Receive, answer: Send) -> None:
        refused = self._refused(scope)
        if refused is not None:
            with suppress(OSError):
                await refused(scope, receive, answer)
            return
        try:
            await self._app(scope, self._limited(receive), answer)
        except Exception as error:  # the application has answered, and raised it again
            event("crash", f"{type(error).__name__}: {error}", id=scope["rarec"]["id"])

    def _refused(self, scope: Scope) -> JSONResponse | None:
        """Return the refusal of a request that is not let in."""
        headers = Headers(scope=scope)
        settings = self._current.settings
        tokens = self._current.tokens
        client = (scope.get("client") or ("",))[0]
        if not _is_own_host(headers.get("host", ""), (scope.get("server") or ("",))[0], settings.hosts):
            remedy = (
                "use one of its names, or allow this one: rarec serve --allow-host NAME, or `hosts` in the settings"
            )
            return problem(421, "this is no name of the service", remedy)
        if tokens is not None and scope["path"] not in OPEN:
            kind, _, token = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(token.strip().encode("latin-1", "replace")).digest()
            matches = [hmac.compare_digest(digest, known) for known in tokens]
            if kind.lower() != "bearer" or not any(matches):
                refused = problem(401, "a bearer token is needed", "send Authorization: Bearer TOKEN")
                refused.headers["www-authenticate"] = "Bearer"
                return refused
            client = digest.hex()
        wait = self._rates.wait(client, settings.rate) if settings.rate and scope["path"] not in OPEN[:2] else 0.0
        if wait:
            return problem(429, "too many requests", "wait", after=wait)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:18]) > settings.max_body:
            return problem(413, _too_large(settings), REMEDIES[413])
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Return the body's parts, as long as it is neither too long nor too slow."""
        settings = self._current.settings
        size = 0
        end = time.monotonic() + settings.body_timeout
        whole = False

        async def limited() -> Message:
            nonlocal size, whole
            if whole:  # what is waited for now is that the client leaves
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            size += len(message.get("body", b""))
            if size > settings.max_body:
                raise HTTPException(413, _too_large(settings))
            whole = not message.get("more_body", False)
            return message

        return limited


def _is_own_host(given: str, address: str, hosts: Sequence[str] | None) -> bool:
    """Return whether a client may ask by a name; see `ServeSettings.hosts`.

    Args:
        given: the header `Host`, which browsers always send; "" for none.
        address: where the request arrived.
        hosts: of the settings.
    """
    allowed = hosts if hosts is not None else LOOPBACK if _is_loopback(address) else ["*"]
    return not given or "*" in allowed or host_name(given) in allowed


def _is_loopback(address: str) -> bool:
    with suppress(ValueError):
        own = ip_address(address)
        return (getattr(own, "ipv4_mapped", None) or own).is_loopback
    return address in LOOPBACK


class Rates:
    """A bucket of tokens for each client."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str, rate: float) -> float:
        """Take a token; return 0, or, if there is none, the seconds until there is one.

        Args:
            client: who asks.
            rate: requests a second.
        """
        now = time.monotonic()
        most = max(1.0, BURST * rate)
        left, moment = self._left.pop(client, (most, now))
        left = min(most, left + (now - moment) * rate)
        served = left >= 1
        self._left[client] = (left - served, now)
        while len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if served else (1 - left) / rate


def _too_large(settings: ServeSettings) -> str:
    return f"the body has more than {settings.max_body:,} bytes"


def problem(status: int, what: str, remedy: str, after: float | None = None) -> JSONResponse:
    """Return an answer that says what is wrong; `after`: seconds after which the client may retry."""
    headers = {"retry-after": str(max(1, round(after + 0.5)))} if after is not None else None
    return JSONResponse({"problem": inert(what), "remedy": inert(remedy)}, status, headers)


def read_tokens(path: Path) -> list[bytes]:
    """Return the hashes of the tokens in a file, one a line.

    Raises:
        UserError: it cannot be read, has no token, or a short one.
    """
    try:
        lines = [line.strip() for line in path.read_text("ascii").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise UserError(f"tokens {path}: {reason}", "name a file with a token on each line") from None
    if not lines or min(map(len, lines)) < 16:
        raise UserError(f"tokens {path}: no token, or one of fewer than 16 characters", "openssl rand -hex 24 > FILE")
    return [hashlib.sha256(line.encode()).digest() for line in lines]


def event(kind: str, text: str | None = None, /, **fields: Any) -> None:
    """Write one line of JSON to standard error; a log that cannot be written ends no service."""
    said = {"text": inert(text)} if text is not None else {}
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **said, **fields}
    with suppress(OSError, ValueError):
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()


# ---- metrics


class Metrics:
    """What a service counts, in Prometheus's form; the counts of several worker processes are added up."""

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

    def bundle(self, kind: str, text: str) -> None:
        """Count what happened to a bundle, and write it as an event."""
        self.events.labels(kind).inc()
        event(kind, text)

    def text(self) -> bytes:
        """Return the metrics as Prometheus reads them."""
        if os.environ.get(FOLDER):
            forget_ended_workers(Path(os.environ[FOLDER]))
        return generate_latest(self._registry)


def forget_ended_workers(folder: Path) -> None:
    """Drop the gauges of worker processes that have ended: nobody waits in them. Linux only."""
    for file in folder.glob("gauge_livesum_*.db"):
        worker = file.stem.rpartition("_")[2]
        if Path("/proc").exists() and not Path("/proc", worker).exists():
            file.unlink(missing_ok=True)  # another worker may have answered at the same time
