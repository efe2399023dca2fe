"""What comes of a request: its result in time, or a refusal with a status, what is wrong, and what to do."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse

from rarec.bundle.base_recommender import NotOffered
from rarec.errors import UserError
from rarec.serve.batcher import Busy, Late
from rarec.serve.bundle_manager import Loaded, Unavailable, Unknown
from rarec.serve.guard import BUSY, REMEDIES, problem

LOADING = 5.0
"""Seconds after which a bundle that is not loaded yet may be."""
OPENAPI = "see /openapi.json"


class ClientLeft(Exception):
    """The client of a request has closed its connection."""


@dataclass(frozen=True)
class Reply:
    """What a bundle has to say to a request.

    Attributes:
        id: of the request.
        loaded: the bundle.
        result: of its engine.
    """

    id: str
    loaded: Loaded
    result: Any

    @property
    def source(self) -> dict[str, Any]:
        """Return what every answer says of itself."""
        return {"id": self.id, **self.loaded.source}


async def result_of(incoming: Incoming, loaded: Loaded, future: "Future[Any]", deadline: float) -> Any:
    """Return the result of a job, which ends with its deadline, or when its client leaves.

    Raises:
        Late: it did not come in time.
        ClientLeft: nobody waits for it any more.
    """
    result, left = asyncio.wrap_future(future), asyncio.ensure_future(_client_left(incoming))
    try:
        await asyncio.wait({result, left}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise ClientLeft if left.done() else Late(loaded.batcher.backlog)
    finally:
        result.cancel()
        left.cancel()


async def _client_left(incoming: Incoming) -> None:
    while (await incoming.receive())["type"] != "http.disconnect":
        pass


def _first_field(error: RequestValidationError) -> str:
    """Name the first field that is wrong. What was sent is not repeated."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))[:200]  # kinds of a union
    return f"{place}: {first['msg']}"[:400]


class Refusal(NamedTuple):
    """How an error is answered; `after`: seconds until the client may retry; `reason`: in the log and the metrics."""

    status: int
    problem: str
    remedy: str
    after: float | None = None
    reason: str | None = None


REFUSED: dict[type[Exception], Callable[[Any], Refusal]] = {
    UserError: lambda error: Refusal(422, error.problem, error.remedy),
    RequestValidationError: lambda error: Refusal(422, _first_field(error), OPENAPI),
    NotOffered: lambda error: Refusal(501, error.problem, error.remedy),
    Unknown: lambda error: Refusal(404, f"there is no bundle {str(error)!r}", "see /v1/bundles"),
    Unavailable: lambda error: Refusal(503, f"bundle {str(error)!r} is not loaded", BUSY, LOADING, "not_loaded"),
    Busy: lambda error: Refusal(503, "too many requests wait", BUSY, error.seconds, "queue"),
    Late: lambda error: Refusal(503, "no answer in time", BUSY, error.seconds, "late"),
    ClientLeft: lambda error: Refusal(499, "the client has left", "wait for the answer"),
    HTTPException: lambda error: Refusal(
        error.status_code,
        str(error.detail),
        REMEDIES.get(error.status_code, OPENAPI),
        1.0 if error.status_code == 503 else None,
    ),
}


async def refuse(refusal: Callable[[Any], Refusal], incoming: Incoming, error: Exception) -> JSONResponse:
    """Answer a request that an error of `REFUSED` has ended."""
    status, what, remedy, after, reason = refusal(error)
    if reason:
        incoming.scope["rarec"]["refused"] = reason
    return problem(status, what, remedy, after)


async def fail(incoming: Incoming, _: Exception) -> JSONResponse:
    """Answer a request that an error of the service has ended."""
    return problem(500, "rarec failed", f"report it with the request's id, {incoming.scope['rarec']['id']}")
