"""The application: `create` is an ASGI factory for `rarec serve`, gunicorn, Ray Serve or any other server."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse

from rarec.bundle.base import NotOffered
from rarec.bundle.recommended import Request
from rarec.errors import UserError
from rarec.serve import schemas
from rarec.serve.bundle_manager import BundleManager, Loaded, Unavailable, Unknown
from rarec.serve.engines import Batcher, Busy, Closed, Engine, load_engine
from rarec.serve.guard import REMEDIES, Guard, Metrics, problem
from rarec.serve.settings import ServeSettings, settings_of_environment
from rarec.version import __version__

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
FOUND = 20
"""Largest number of items that a search for titles returns, unless the client says otherwise."""
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem, "description": text}
    for status, text in {
        401: "a token is needed", 404: "no such bundle", 413: "too large", 421: "not by this name",
        422: "a field is wrong", 429: "too often",
        501: "not with this backend", 503: "busy, or not ready; try again after Retry-After seconds",
    }.items()
}  # fmt: skip
RETRY_AFTER = 1
"""Seconds after which a rejected client may retry: the queue is short, and empty long before."""


def create() -> Guard:
    """Return the application, with the settings of the file that RAREC_SERVE names.

    Raises:
        UserError: the settings are wrong.
    """
    return assemble()[0]


def assemble(read: Callable[[], ServeSettings] = settings_of_environment) -> tuple[Guard, BundleManager]:
    """Return the application and its bundles, which load when it starts.

    Args:
        read: returns the settings, and again once a second.

    Raises:
        UserError: the settings are wrong.
    """
    metrics = Metrics()
    manager = BundleManager(read, load_engine, metrics)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        manager.start()
        yield
        await run_in_threadpool(manager.close)

    app = FastAPI(title="rarec", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False  # a redirect leads to whatever host the client names
    app.add_exception_handler(Exception, _failed)
    for kind, refusal in REFUSED.items():
        app.add_exception_handler(kind, partial(_refuse, refusal))
    Service(manager, metrics).add_to(app)
    return Guard(app, manager, metrics), manager


class Service:
    """The routes.

    Args:
        manager: the bundles.
        metrics: of the process.
    """

    def __init__(self, manager: BundleManager, metrics: Metrics) -> None:
        self._manager, self._metrics = manager, metrics

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        routes: dict[str, Callable[..., Any]] = {
            "/v1/recommend": self.recommend,
            "/v1/users/vector": self.vectors,
            "/v1/items/similar": self.similar,
            "/v1/items/place": self.place,
            "/v1/explain": self.explain,
            "/v1/compare": self.compare,
        }
        for path, route in routes.items():
            app.post(path, responses=REFUSALS)(route)
        app.get("/v1/items", responses=REFUSALS)(self.items)
        app.get("/v1/users/sample", responses=REFUSALS)(self.sample)
        app.get("/v1/bundles", responses=REFUSALS)(self.bundles)
        app.get("/health")(self.health)
        app.get("/ready")(self.ready)
        app.get("/metrics")(self.metrics)
        if self._manager.settings.page:
            for path, (name, kind) in FILES.items():
                app.get(path, include_in_schema=False)(_page(PAGE / name, kind))

    async def recommend(self, incoming: Incoming, request: schemas.RecommendRequest) -> schemas.Recommended:
        """Return the best items for each history."""
        options = request.model_dump(exclude={"histories", "bundle", "user"})
        requests = [Request(history, **options) for history in request.histories]
        loaded, answers = await self._ask(incoming, request, lambda batcher: batcher.answer(requests))
        unknown = answers[0].unknown_in_rules  # all users have the same rules
        return schemas.Recommended(results=answers, unknown_in_rules=unknown, **loaded.source)

    async def vectors(self, incoming: Incoming, request: schemas.VectorsRequest) -> schemas.Vectors:
        """Return the query vector of each history: what an index of the item vectors is searched with."""
        loaded, vectors = await self._call(incoming, request, lambda engine: engine.vectors(request.histories))
        return schemas.Vectors(vectors=vectors, **loaded.source)

    async def similar(self, incoming: Incoming, request: schemas.SimilarRequest) -> schemas.Items:
        """Return the items that are most like one."""
        item, k = request.item, request.k
        loaded, items = await self._call(incoming, request, lambda engine: engine.recommender.similar(item, k))
        return schemas.Items(items=items, **loaded.source)

    async def place(self, incoming: Incoming, request: schemas.PlaceRequest) -> schemas.Placed:
        """Return where an item that is not in the catalogue would stand in a user's ranking."""
        new = request.history, request.title, request.text, request.k
        loaded, place = await self._call(incoming, request, lambda engine: engine.recommender.place(*new))
        return schemas.Placed(**vars(place), **loaded.source)

    async def explain(self, incoming: Incoming, request: schemas.ExplainRequest) -> schemas.Explained:
        """Return the evidence for an item after a history: each part's share of its score, the nearest items."""
        history, item = request.history, request.item
        loaded, evidence = await self._call(incoming, request, lambda engine: engine.recommender.explain(history, item))
        return schemas.Explained(**vars(evidence), **loaded.source)

    async def compare(self, incoming: Incoming, request: schemas.CompareRequest) -> schemas.Compared:
        """Return the best items by each part of the recommender alone."""
        history, k = request.history, request.k
        loaded, parts = await self._call(incoming, request, lambda engine: engine.recommender.compare(history, k))
        return schemas.Compared(row=loaded.engine.row, parts=parts, **loaded.source)

    async def items(
        self,
        query: Annotated[str, Query(max_length=200, description="Words that the title holds.")] = "",
        limit: Annotated[int, Query(ge=1, le=200)] = FOUND,
        bundle: Annotated[str | None, Query(max_length=40)] = None,
        user: Annotated[str, Query(max_length=200)] = "",
    ) -> schemas.FoundItems:
        """Return items whose titles hold all words of a query."""
        loaded = self._manager.pick(bundle, user)
        words = query.casefold().split()
        rows = (row for row, title in enumerate(loaded.folded) if all(word in title for word in words))
        return _found(loaded, await run_in_threadpool(list, islice(rows, limit)))

    async def sample(
        self, incoming: Incoming, user: Annotated[str | None, Query(max_length=200)] = None
    ) -> schemas.FoundItems:
        """Return the history of a user who might be: items that are bought together."""
        request = schemas.BaseRequest(user=user)
        return _found(*await self._call(incoming, request, lambda engine: engine.recommender.sample_user()))

    async def bundles(self) -> dict[str, Any]:
        """Return what is served: names, rows, versions, shares."""
        return {"bundles": self._manager.state()}

    async def health(self) -> dict[str, str]:
        """Return whether the process answers."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Return whether every bundle serves; 503 if not."""
        ready = self._manager.ready
        state = self._manager.state().items()
        bundles = {name: {field: facts[field] for field in ("loaded", "trouble")} for name, facts in state}
        # with tokens, /v1/bundles alone tells more: troubles name paths, and nobody needs a token here
        details = {} if self._manager.settings.tokens else {"bundles": bundles}
        return JSONResponse({"ready": ready, **details}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """Return the metrics, in Prometheus's form."""
        self._metrics.waiting.set(self._manager.waiting)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _call(
        self, incoming: Incoming, request: schemas.BaseRequest, work: Callable[[Engine], Any]
    ) -> tuple[Loaded, Any]:
        """Have a bundle's engine work for the users of a request; return the bundle and the result."""
        users = len(request.all_histories)
        return await self._ask(incoming, request, lambda batcher: batcher.call(partial(work, batcher.engine), users))

    async def _ask(
        self, incoming: Incoming, request: schemas.BaseRequest, submit: Callable[[Batcher], "Future[Any]"]
    ) -> tuple[Loaded, Any]:
        """Submit a request that is within the limits; return the bundle and its result: all is from one bundle."""
        self._check(request)
        note: dict[str, Any] = incoming.scope["rarec"]
        note["users"] = len(request.all_histories)
        while True:
            loaded = self._manager.pick(request.bundle, request.user if request.user is not None else note["id"])
            try:
                future = submit(loaded.batcher)
                break
            except Closed:  # another bundle has just taken its place
                await asyncio.sleep(0)
        note |= loaded.source
        return loaded, await asyncio.wait_for(asyncio.wrap_future(future), self._manager.settings.timeout)

    def _check(self, request: schemas.BaseRequest) -> None:
        """Refuse what is beyond the limits of the settings."""
        limits = self._manager.settings
        histories = request.all_histories
        for what, value, most in (
            ("histories", len(histories), limits.max_users),
            ("items in a history", max(map(len, histories)), limits.max_history),
            ("k", getattr(request, "k", 1), limits.max_k),
        ):
            if value > most:
                raise UserError(f"{what}: {value:,}, more than {most:,}", "ask for less at a time")


def _found(loaded: Loaded, rows: Iterable[int]) -> schemas.FoundItems:
    engine = loaded.engine
    items = [schemas.Found(item=engine.ids[row], title=engine.titles[row]) for row in rows]
    return schemas.FoundItems(items=items, **loaded.source)


def _page(file: Path, kind: str) -> Callable[[], Response]:
    """Return what answers with a file of the page, as it is when the service starts."""
    content = file.read_bytes()
    return lambda: Response(content, media_type=f"{kind}; charset=utf-8")


# ---- refusals: a status, what is wrong, and what to do


def _first_field(error: RequestValidationError) -> str:
    """Name the first field that is wrong. What was sent is not repeated."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))[:200]  # kinds of a union
    return f"{place}: {first['msg']}"[:400]


OPENAPI, BUSY = "see /openapi.json", "try again after Retry-After seconds"
REFUSED: dict[type[Exception], Callable[[Any], tuple[int, str, str]]] = {
    UserError: lambda error: (422, error.problem, error.remedy),
    RequestValidationError: lambda error: (422, _first_field(error), OPENAPI),
    NotOffered: lambda error: (501, error.problem, error.remedy),
    Unknown: lambda error: (404, f"there is no bundle {str(error)!r}", "see /v1/bundles"),
    Unavailable: lambda error: (503, f"bundle {str(error)!r} is not loaded", BUSY),
    Busy: lambda error: (503, "too many users wait", BUSY),
    TimeoutError: lambda error: (503, "no answer in time", BUSY),
    HTTPException: lambda error: (error.status_code, str(error.detail), REMEDIES.get(error.status_code, OPENAPI)),
}


async def _refuse(refusal: Callable[[Any], tuple[int, str, str]], _: Incoming, error: Exception) -> JSONResponse:
    status, what, remedy = refusal(error)
    return problem(status, what, remedy, after=RETRY_AFTER if status == 503 else None)


async def _failed(incoming: Incoming, _: Exception) -> JSONResponse:
    return problem(500, "rarec failed", f"report it with the request's id, {incoming.scope['rarec']['id']}")
