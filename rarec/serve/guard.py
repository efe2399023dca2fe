"""What stands before every request: tokens, rates, limits of size and time, safe headers, the access log, metrics."""

import asyncio
import hashlib
import hmac
import json
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rarec.console.inert import inert
from rarec.errors import UserError
from rarec.serve.settings import ServeSettings

OPEN = ("/health", "/ready", "/", "/page.js", "/page.css")
"""Paths that need no token: they tell nothing of a bundle's items."""
CLIENTS = 10_000
"""Clients whose rate is remembered."""
BURST = 2.0
"""Seconds of its rate that a client may use at once."""
REMEDIES = {404: "see /openapi.json", 405: "see /openapi.json", 408: "send it at once", 413: "send less at a time"}
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


class Guard:
    """Wraps the application.

    Args:
        app: the application.
        current: has the settings and the hashes of the tokens as they are now.
        observe: is told method, route, status and seconds of each request.
    """

    def __init__(self, app: ASGIApp, current: Current, observe: Callable[[str, str, int, float], None]) -> None:
        self._app, self._current, self._observe = app, current, observe
        self._rates = Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, seen = time.perf_counter(), {"status": 0, "bytes": 0}
        scope["rarec"] = note = {"id": uuid.uuid4().hex}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                MutableHeaders(scope=message).update({**SAFE, "x-request-id": note["id"]})
            seen["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            await self._serve(scope, receive, answer, seen)
        finally:
            seconds, route = time.perf_counter() - started, getattr(scope.get("route"), "path", "other")
            self._observe(scope["method"], route, seen["status"], seconds)
            log(scope, route, seen, seconds)

    async def _serve(self, scope: Scope, receive: Receive, answer: Send, seen: dict[str, int]) -> None:
        refused = self._refused(scope)
        if refused is None:
            try:
                await self._app(scope, self._limited(receive), answer)
                return
            except Exception as error:
                event("crash", f"{type(error).__name__}: {error}", id=scope["rarec"]["id"])
                refused = failed(scope)
            if seen["status"]:  # half an answer is on its way
                return
        with suppress(OSError):
            await refused(scope, receive, answer)

    def _refused(self, scope: Scope) -> JSONResponse | None:
        """Return the refusal of a request that is not let in."""
        headers, settings, tokens = Headers(scope=scope), self._current.settings, self._current.tokens
        client = (scope.get("client") or ("",))[0]
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
        size, end, whole = 0, time.monotonic() + settings.body_timeout, False

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
        now, most = time.monotonic(), max(1.0, BURST * rate)
        left, moment = self._left.pop(client, (most, now))
        left = min(most, left + (now - moment) * rate)
        served = left >= 1
        self._left[client] = (left - served, now)
        while len(self._left) > CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if served else (1 - left) / rate


def _too_large(settings: ServeSettings) -> str:
    return f"the body has more than {settings.max_body:,} bytes"


def failed(scope: Scope) -> JSONResponse:
    """Return the answer to a request at which rarec failed."""
    return problem(500, "rarec failed", f"report it with the request's id, {scope['rarec']['id']}")


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


def log(scope: Scope, route: str, seen: dict[str, int], seconds: float) -> None:
    """Write one line of the access log. No history, item, user or token is in it."""
    note: dict[str, Any] = scope["rarec"]
    event("request", None, method=scope["method"], route=route, ms=round(1000 * seconds, 1), **seen, **note)


def event(kind: str, text: str | None = None, /, **fields: Any) -> None:
    """Write one line of JSON to standard error; a log that cannot be written ends no service."""
    said = {"text": inert(text)} if text is not None else {}
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **said, **fields}
    with suppress(OSError, ValueError):
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()
