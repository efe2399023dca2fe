"""What refuses a request: an error with a status, what is wrong, and what to do about it."""

import math

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse

from rarec.bundle.base_recommender import NotOffered
from rarec.console.inert import inert
from rarec.errors import UserError

BUSY = "try again after Retry-After seconds"
OPENAPI = "see /openapi.json"
ROUTING = {404: "not_found", 405: "method"}
"""Reasons of refusals by the router."""


class Refused(HTTPException):
    """A request is not answered.

    Args:
        status: of HTTP.
        problem: what is wrong.
        remedy: what the client can do about it.
        reason: in the log and the metrics.
        after: seconds after which the client may retry.
    """

    def __init__(
        self, status: int, problem: str, remedy: str, reason: str | None = None, after: float | None = None
    ) -> None:
        headers = {"retry-after": str(max(1, math.ceil(after)))} if after is not None else {}
        super().__init__(status, problem, headers)
        self.remedy, self.reason = remedy, reason

    def answer(self) -> JSONResponse:
        """Return what the client gets."""
        content = {"problem": inert(self.detail), "remedy": inert(self.remedy)}
        return JSONResponse(content, self.status_code, self.headers)


async def refuse(incoming: Incoming, error: Exception) -> JSONResponse:
    """Answer a request that an error has ended."""
    refused = _refusal_of(error, incoming.scope["rarec"]["id"])
    if refused.reason:
        incoming.scope["rarec"]["refused"] = refused.reason
    return refused.answer()


def _refusal_of(error: Exception, request: str) -> Refused:
    match error:
        case Refused():
            return error
        case NotOffered():
            return Refused(501, error.problem, error.remedy, "not_offered")
        case UserError():
            return Refused(422, error.problem, error.remedy, "field")
        case RequestValidationError():
            return Refused(422, _first_field(error), OPENAPI, "field")
        case HTTPException():
            return Refused(error.status_code, str(error.detail), OPENAPI, ROUTING.get(error.status_code))
    return Refused(500, "rarec failed", f"report it with the request's id, {request}")


def _first_field(error: RequestValidationError) -> str:
    """Name the first field that is wrong. What was sent is not repeated."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))[:200]  # kinds of a union
    return f"{place}: {first['msg']}"[:400]
