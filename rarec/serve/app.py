"""The application: `create` is an ASGI factory for `rarec serve`, gunicorn, Ray Serve or any other server."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse

from rarec.bundle.recommended import History, Recommended, Request
from rarec.errors import UserError
from rarec.serve import schemas
from rarec.serve.batcher import RETRY_AFTER, Batcher, Busy, Closed
from rarec.serve.bundle_manager import BundleManager, Loaded, Unavailable, Unknown
from rarec.serve.engines import Engine, NotOffered, load_engine
from rarec.serve.guard import REMEDIES, Guard, event, failed, problem
from rarec.serve.metrics import Metrics
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
        401: "a token is needed", 404: "no such bundle", 413: "too large", 422: "a field is wrong", 429: "too often",
        501: "not with this backend", 503: "busy, or not ready; try again after Retry-After seconds",
    }.items()
}  # fmt: skip


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

    def note_event(kind: str, text: str) -> None:
        metrics.events.labels(kind).inc()
        event(kind, text)

    manager = BundleManager(read, load_engine, metrics.batch.observe, note_event)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        manager.start()
        yield
        await run_in_threadpool(manager.close)

    app = FastAPI(title="rarec", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    Service(manager, metrics).add_to(app)
    _add_refusals(app)

    def observe(method: str, route: str, status: int, seconds: float) -> None:
        metrics.request(method, route, status, seconds)
        metrics.waiting.set(manager.waiting)  # also where another worker is asked for the metrics

    return Guard(app, manager, observe), manager


class Service:
    """The routes.

    Args:
        manager: the bundles.
        metrics: of the process.
    """

    def __init__(self, manager: BundleManager, metrics: Metrics) -> None:
        self._manager, self._counts = manager, metrics

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
                app.get(path, include_in_schema=False)(_file(PAGE / name, kind))

    async def recommend(self, incoming: Incoming, request: schemas.RecommendRequest) -> schemas.Recommended:
        """Return the best items for each history."""
        self._check(request.histories, request.k)
        requests = [
            Request(history, request.k, request.exclude_seen, request.allow, request.deny, request.popular_if_empty)
            for history in request.histories
        ]
        loaded, answers = await self._ask(incoming, request, lambda batcher: batcher.answer(requests), len(requests))
        results = [schemas.UserItems(items=_items(answer.items), unknown=answer.unknown) for answer in answers]
        return schemas.Recommended(results=results, **_of(loaded))

    async def vectors(self, incoming: Incoming, request: schemas.VectorsRequest) -> schemas.Vectors:
        """Return the query vector of each history: what an index of the item vectors is searched with."""
        self._check(request.histories)
        users = len(request.histories)
        loaded, result = await self._call(incoming, request, lambda engine: engine.vectors(request.histories), users)
        return schemas.Vectors(vectors=result, **_of(loaded))

    async def similar(self, incoming: Incoming, request: schemas.SimilarRequest) -> schemas.Items:
        """Return the items that are most like one."""
        self._check([], request.k)
        loaded, result = await self._call(incoming, request, lambda engine: engine.similar(request.item, request.k))
        return schemas.Items(items=_items(result), **_of(loaded))

    async def place(self, incoming: Incoming, request: schemas.PlaceRequest) -> schemas.Placed:
        """Return where an item that is not in the catalogue would stand in a user's ranking."""
        self._check([request.history], request.k)
        loaded, result = await self._call(
            incoming, request, lambda engine: engine.place(request.history, request.title, request.text, request.k)
        )
        above, below = _items(result.above), _items(result.below)
        return schemas.Placed(
            rank=result.rank, of=result.of, score=result.score, above=above, below=below, **_of(loaded)
        )

    async def explain(self, incoming: Incoming, request: schemas.ExplainRequest) -> schemas.Explained:
        """Return the evidence for an item after a history: each part's share of its score, the nearest items."""
        self._check([request.history])
        loaded, result = await self._call(
            incoming, request, lambda engine: engine.explain(request.history, request.item)
        )
        return schemas.Explained(
            item=result.item, title=result.title, parts=result.parts, nearest=_items(result.nearest), **_of(loaded)
        )

    async def compare(self, incoming: Incoming, request: schemas.CompareRequest) -> schemas.Compared:
        """Return the best items by each part of the recommender alone."""
        self._check([request.history], request.k)
        loaded, result = await self._call(incoming, request, lambda engine: engine.compare(request.history, request.k))
        parts = {title: _items(items) for title, items in result.items()}
        return schemas.Compared(row=loaded.engine.row, parts=parts, **_of(loaded))

    async def items(
        self,
        query: Annotated[str, Query(max_length=200, description="Words that the title holds.")] = "",
        limit: Annotated[int, Query(ge=1, le=200)] = FOUND,
        bundle: Annotated[str | None, Query(max_length=40)] = None,
        user: Annotated[str, Query(max_length=200)] = "",
    ) -> schemas.FoundItems:
        """Return items whose titles hold all words of a query."""
        loaded = self._manager.pick(bundle, user)
        result = await run_in_threadpool(_search, loaded, query, limit)
        return schemas.FoundItems(items=result, **_of(loaded))

    async def sample(
        self, incoming: Incoming, user: Annotated[str | None, Query(max_length=200)] = None
    ) -> schemas.FoundItems:
        """Return the history of a user who might be: items that are bought together."""
        loaded, items = await self._call(incoming, schemas.BaseRequest(user=user), lambda engine: engine.sample())
        return schemas.FoundItems(items=[schemas.Found(item=item, title=title) for item, title in items], **_of(loaded))

    async def bundles(self) -> dict[str, Any]:
        """Return what is served: names, rows, versions, shares."""
        return {"bundles": self._manager.state()}

    async def health(self) -> dict[str, str]:
        """Return whether the process answers."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Return whether every bundle serves; 503 if not."""
        ready, state = self._manager.ready, self._manager.state().items()
        bundles = {name: {field: facts[field] for field in ("loaded", "trouble")} for name, facts in state}
        # with tokens, /v1/bundles alone tells more: troubles name paths, and nobody needs a token here
        details = {} if self._manager.settings.tokens else {"bundles": bundles}
        return JSONResponse({"ready": ready, **details}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """Return the metrics, in Prometheus's form."""
        self._counts.waiting.set(self._manager.waiting)
        return Response(self._counts.text(), media_type="text/plain; version=0.0.4")

    async def _call(
        self, incoming: Incoming, request: schemas.BaseRequest, work: Callable[[Engine], Any], users: int = 1
    ) -> tuple[Loaded, Any]:
        def submit(batcher: Batcher) -> "Future[Any]":
            return batcher.call(lambda: work(batcher.engine), users)

        return await self._ask(incoming, request, submit, users)

    async def _ask(
        self, incoming: Incoming, request: schemas.BaseRequest, submit: Callable[[Batcher], "Future[Any]"], users: int
    ) -> tuple[Loaded, Any]:
        """Have a bundle work; return it and the result. All of an answer is from one bundle."""
        note: dict[str, Any] = incoming.scope["rarec"]
        note["users"] = users
        while True:
            loaded = self._manager.pick(request.bundle, request.user if request.user is not None else note["id"])
            try:
                future = submit(loaded.batcher)
                break
            except Closed:  # another bundle has just taken its place
                await asyncio.sleep(0)
        note["bundle"], note["version"] = loaded.name, loaded.engine.version[:12]
        return loaded, await asyncio.wait_for(asyncio.wrap_future(future), self._manager.settings.timeout)

    def _check(self, histories: Sequence[History], k: int = 1) -> None:
        """Refuse what is beyond the limits of the settings."""
        limits = self._manager.settings
        longest = max(map(len, histories), default=0)
        for what, value, most in (
            ("histories", len(histories), limits.max_users),
            ("items in a history", longest, limits.max_history),
            ("k", k, limits.max_k),
        ):
            if value > most:
                raise UserError(f"{what}: {value:,}, more than {most:,}", "ask for less at a time")


def _add_refusals(app: FastAPI) -> None:
    """Answer errors by their status and in two lines: what is wrong, and what to do."""
    busy = "try again after Retry-After seconds"

    def on(kind: type[Exception], answer: Callable[[Any], JSONResponse]) -> None:
        async def handler(_: Incoming, error: Exception) -> JSONResponse:
            return answer(error)

        app.add_exception_handler(kind, handler)

    on(UserError, lambda error: problem(422, error.problem, error.remedy))
    on(NotOffered, lambda error: problem(501, f"{error}: not offered by ONNX Runtime", "rarec serve --backend torch"))
    on(Unknown, lambda error: problem(404, f"there is no bundle {str(error)!r}", "see /v1/bundles"))
    on(Unavailable, lambda error: problem(503, f"bundle {str(error)!r} is not loaded", busy, after=RETRY_AFTER))
    on(Busy, lambda error: problem(503, "too many users wait", busy, after=RETRY_AFTER))
    on(TimeoutError, lambda error: problem(503, "no answer in time", busy, after=RETRY_AFTER))
    on(RequestValidationError, _invalid)

    async def crashed(incoming: Incoming, _: Exception) -> JSONResponse:
        return failed(incoming.scope)

    app.add_exception_handler(Exception, crashed)  # the server raises it again, so that the guard logs it
    on(HTTPException, lambda error: problem(error.status_code, str(error.detail), _remedy(error)))


def _remedy(error: HTTPException) -> str:
    return REMEDIES.get(error.status_code, "see /openapi.json")


def _invalid(error: RequestValidationError) -> JSONResponse:
    """Name the first field that is wrong. What was sent is not repeated."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))[:200]  # kinds of a union
    return problem(422, f"{place}: {first['msg']}"[:400], "see /openapi.json")


def _search(loaded: Loaded, query: str, limit: int) -> list[schemas.Found]:
    words = query.casefold().split()
    rows = (row for row, title in enumerate(loaded.folded) if all(word in title for word in words))
    engine = loaded.engine
    return [schemas.Found(item=engine.ids[row], title=engine.titles[row]) for row in islice(rows, limit)]


def _items(ranking: Sequence[Recommended]) -> list[schemas.Item]:
    return [schemas.Item(**item._asdict()) for item in ranking]


def _of(loaded: Loaded) -> dict[str, str]:
    return {"bundle": loaded.name, "version": loaded.engine.version[:12]}


def _file(path: Path, kind: str) -> Callable[[], Any]:
    content = path.read_bytes()

    async def answer() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8")

    return answer
