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
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rarec.serve.bundle_manager import BundleManager
from rarec.serve.refusals import BUSY, Refused
from rarec.serve.settings import LOOPBACK, host_name
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


class Guard:
    """Wraps the application.

    Args:
        app: the application.
        manager: has the bundles, and the settings and the hashes of the tokens as they are now.
        metrics: of the process.
    """

    def __init__(self, app: ASGIApp, manager: BundleManager, metrics: Metrics) -> None:
        self._app, self._manager, self._metrics = app, manager, metrics
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
            await early(scope, receive, send)
            return
        self._in_flight += own
        try:
            await self._observe(scope, receive, send, started)
        finally:
            self._in_flight -= own

    def refuse_early(self) -> JSONResponse | None:
        """Return the answer to a request that there is no time or room for, whatever it asks; None if there is."""
        seconds = 1.0 if self._in_flight >= IN_FLIGHT else self._manager.overload
        if not seconds:
            return None
        self._metrics.refuse_early()
        self._early += 1
        if (now := time.monotonic()) > self._said + SAID_EVERY:
            event("overload", f"{self._early:,} requests refused; what waits takes {seconds:.1f} s")
            self._early, self._said = 0, now
        return _overloaded(math.ceil(seconds))

    async def _observe(self, scope: Scope, receive: Receive, send: Send, started: float) -> None:
        """Serve a request, count it, and log it."""
        note: dict[str, Any] = {"id": uuid.uuid4().hex, "status": 0, "bytes": 0}
        scope["rarec"], scope["rarec.deadline"], scope["rarec.body"] = note, started + self._manager.settings.timeout, 0

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
            self._metrics.request(scope["method"], route, note["status"], seconds, note.get("refused"))
            self._metrics.waiting.set(self._manager.waiting)  # also where another worker is asked for the metrics
            event("request", None, method=scope["method"], route=route, ms=round(1000 * seconds, 1), **note)

    async def _serve(self, scope: Scope, receive: Receive, answer: Send) -> None:
        app = self._app
        try:
            self._check(scope)
        except Refused as refused:
            scope["rarec"]["refused"] = refused.reason
            app = refused.answer()
        try:
            await app(scope, receive, answer)
        except Exception as error:  # the application has answered, and raised it again
            event("crash", f"{type(error).__name__}: {error}", id=scope["rarec"]["id"])

    def _check(self, scope: Scope) -> None:
        """Raise `Refused` for a request that is not let in."""
        headers, settings, tokens = Headers(scope=scope), self._manager.settings, self._manager.tokens
        client = (scope.get("client") or ("",))[0]
        if not _is_own_host(headers.get("host", ""), (scope.get("server") or ("",))[0], settings.hosts):
            remedy = (
                "use one of its names, or allow this one: rarec serve --allow-host NAME, or `hosts` in the settings"
            )
            raise Refused(421, "this is no name of the service", remedy, "host")
        if tokens is not None and scope["path"] not in OPEN:
            kind, _, token = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(token.strip().encode("latin-1", "replace")).digest()
            matches = [hmac.compare_digest(digest, known) for known in tokens]
            if kind.lower() != "bearer" or not any(matches):
                refused = Refused(401, "a bearer token is needed", "send Authorization: Bearer TOKEN", "token")
                refused.headers = {"www-authenticate": "Bearer"}
                raise refused
            client = digest.hex()
        wait = self._rates.wait(client, settings.rate) if settings.rate and scope["path"] not in OPEN[:2] else 0.0
        if wait:
            raise Refused(429, "too many requests", "wait", "rate", after=wait)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:18]) > settings.max_body:
            raise _too_large(settings.max_body)

    def _limited(self, scope: Scope, receive: Receive, started: float) -> Receive:
        """Return the body's parts, as long as it is neither too long nor too slow, and all bodies have room."""
        settings = self._manager.settings
        end = started + settings.body_timeout
        whole = False

        async def limited() -> Message:
            nonlocal whole
            if whole:  # what is waited for now is that the client leaves
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise Refused(408, "the body did not arrive in time", "send it at once", "slow") from None
            size = len(message.get("body", b""))
            self._bytes += size
            scope["rarec.body"] += size
            if scope["rarec.body"] > settings.max_body:
                raise _too_large(settings.max_body)
            if self._bytes > max(BODIES, settings.max_body):
                raise Refused(503, "too many large requests at once", BUSY, "bodies", after=1.0)
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


def _too_large(most: int) -> Refused:
    return Refused(413, f"the body has more than {most:,} bytes", "send less at a time", "size")


@lru_cache(maxsize=1000)
def _overloaded(seconds: int) -> JSONResponse:
    """Return the refusal that is the same for all requests of a moment."""
    response = Refused(503, "too many requests wait", BUSY, after=seconds).answer()
    response.headers.update(SAFE)
    return response
