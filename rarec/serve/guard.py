"""What stands before every request: load, tokens, rates, limits of size and time, safe headers, the access log."""

import asyncio
import hashlib
import hmac
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rarec.console.inert import inert
from rarec.errors import UserError
from rarec.serve.settings import LOOPBACK, ServeSettings, host_name
from rarec.serve.telemetry import Metrics, event

OPEN = ("/health", "/ready", "/", "/page.js", "/page.css")
"""Paths that need no token: they tell nothing of a bundle's items."""
COMPUTED = "/v1/"
"""Where the paths begin whose answers take a bundle."""
CLIENTS = 10_000
"""Clients whose rate is remembered."""
BURST = 2.0
"""Seconds of its rate that a client may use at once."""
IN_FLIGHT = 1000
"""Requests of a process that are read or wait at once."""
BODIES = 64 << 20
"""Bytes of their bodies."""
SAID_EVERY = 10.0
"""Seconds between two events that say how many requests were refused for load: a line for each would add to it."""
BUSY = "try again after Retry-After seconds"
REMEDIES = {408: "send it at once", 413: "send less at a time", 503: BUSY}
REASONS = {
    401: "token", 404: "not_found", 405: "method", 408: "slow", 413: "size", 421: "host", 422: "field", 429: "rate",
    499: "client_left", 501: "not_offered", 503: "bodies",
}  # fmt: skip
"""Of refusals, in the log and in the metrics, where nothing else is noted."""
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

    @property
    def overload(self) -> float:
        """Return the seconds until what waits is answered, where no more can be answered in time; else 0."""


class Guard:
    """Wraps the application.

    Args:
        app: the application.
        current: has the settings and the hashes of the tokens as they are now.
        metrics: of the process.
    """

    def __init__(self, app: ASGIApp, current: Current, metrics: Metrics) -> None:
        self._app, self._current, self._metrics = app, current, metrics
        self._rates = Rates()
        self._in_flight = self._bytes = self._early = 0
        self._said = -math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, and write a line of the access log: without any history, item, user or token."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = scope.get("state", {}).get("first_byte", time.monotonic())
        own = scope["path"].startswith(COMPUTED)
        if own and (early := self.refuse_early()):
            await send({"type": "http.response.start", "status": 503, "headers": early.headers})
            await send({"type": "http.response.body", "body": early.body})
            return
        self._in_flight += own
        try:
            await self._observe(scope, receive, send, started)
        finally:
            self._in_flight -= own

    def refuse_early(self) -> "Early | None":
        """Return the answer to a request that there is no time or room for, whatever it asks; None if there is."""
        seconds = 1.0 if self._in_flight >= IN_FLIGHT else self._current.overload
        if not seconds:
            return None
        self._metrics.refuse_early()
        self._early += 1
        if (now := time.monotonic()) > self._said + SAID_EVERY:
            event("overload", f"{self._early:,} requests refused; what waits takes {seconds:.1f} s")
            self._early, self._said = 0, now
        return _early(math.ceil(seconds))

    async def _observe(self, scope: Scope, receive: Receive, send: Send, started: float) -> None:
        """Serve a request, count it, and log it."""
        note: dict[str, Any] = {"id": uuid.uuid4().hex, "status": 0, "bytes": 0}
        scope["rarec"], scope["rarec.deadline"], scope["rarec.body"] = note, started + self._current.settings.timeout, 0

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                note["status"] = message["status"]
                MutableHeaders(scope=message).update({**SAFE, "x-request-id": note["id"]})
            note["bytes"] += len(message.get("body", b""))
            await asyncio.wait_for(send(message), PATIENCE)

        try:
            await self._serve(scope, self._limited(scope, receive, started), answer)
        finally:
            self._bytes -= scope["rarec.body"]
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "other")
            if note["status"] in REASONS:
                note.setdefault("refused", REASONS[note["status"]])
            self._metrics.request(scope["method"], route, note["status"], seconds, note.get("refused"))
            self._metrics.waiting.set(self._current.waiting)  # also where another worker is asked for the metrics
            event("request", None, method=scope["method"], route=route, ms=round(1000 * seconds, 1), **note)

    async def _serve(self, scope: Scope, receive: Receive, answer: Send) -> None:
        refused = self._refused(scope)
        if refused is not None:
            with suppress(OSError):
                await refused(scope, receive, answer)
            return
        try:
            await self._app(scope, receive, answer)
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

    def _limited(self, scope: Scope, receive: Receive, started: float) -> Receive:
        """Return the body's parts, as long as it is neither too long nor too slow, and all bodies have room."""
        settings = self._current.settings
        end = started + settings.body_timeout
        whole = False

        async def limited() -> Message:
            nonlocal whole
            if whole:  # what is waited for now is that the client leaves
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            size = len(message.get("body", b""))
            self._bytes += size
            scope["rarec.body"] += size
            if scope["rarec.body"] > settings.max_body:
                raise HTTPException(413, _too_large(settings))
            if self._bytes > max(BODIES, settings.max_body):
                raise HTTPException(503, "too many large requests at once")
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
    headers = {"retry-after": str(max(1, math.ceil(after)))} if after is not None else None
    return JSONResponse({"problem": inert(what), "remedy": inert(remedy)}, status, headers)


class Early(NamedTuple):
    """A refusal that is the same for all requests of a moment: its headers, its body, and both as HTTP/1.1."""

    headers: list[tuple[bytes, bytes]]
    body: bytes
    whole: bytes


@lru_cache(maxsize=1000)
def _early(seconds: int) -> Early:
    response = problem(503, "too many requests wait", BUSY, after=seconds)
    response.headers.update(SAFE)
    headers, body = response.raw_headers, bytes(response.body)
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return Early(headers, body, b"HTTP/1.1 503 Service Unavailable\r\n" + lines + b"\r\n" + body)


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
