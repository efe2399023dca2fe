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
from rarec.serve import schemas as asked
from rarec.serve.batcher import RETRY_AFTER, Batcher, Busy, Closed
from rarec.serve.bundle_manager import Fleet, Loaded, Unavailable, Unknown
from rarec.serve.engine import Engine, NotOffered
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
    status: {"model": asked.Problem, "description": text}
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


def assemble(read: Callable[[], ServeSettings] = settings_of_environment) -> tuple[Guard, Fleet]:
    """Return the application and its bundles, which load when it starts.

    Args:
        read: returns the settings, and again once a second.

    Raises:
        UserError: the settings are wrong.
    """
    metrics = Metrics()

    def happened(kind: str, text: str) -> None:
        metrics.events.labels(kind).inc()
        event(kind, text)

    fleet = Fleet(read, load_engine, metrics.batch.observe, happened)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        fleet.start()
        yield
        await run_in_threadpool(fleet.close)

    app = FastAPI(title="rarec", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    Service(fleet, metrics).add_to(app)
    _add_refusals(app)

    def observe(method: str, route: str, status: int, seconds: float) -> None:
        metrics.request(method, route, status, seconds)
        metrics.waiting.set(fleet.waiting)  # also where another worker is asked for the metrics

    return Guard(app, fleet, observe), fleet


def load_engine(settings: ServeSettings, path: Path) -> Engine:
    """Open the engine of a bundle.

    Raises:
        UserError: it is missing or damaged.
    """
    if settings.backend == "onnx":
        from rarec.serve.onnx_engine import OnnxEngine

        return OnnxEngine(path)
    from rarec.bundle.bundle import Bundle
    from rarec.serve.torch_engine import TorchEngine

    return TorchEngine(Bundle.open(path, settings.trusted), settings.device, settings.llm)


class Service:
    """The routes.

    Args:
        fleet: the bundles.
        metrics: of the process.
    """

    def __init__(self, fleet: Fleet, metrics: Metrics) -> None:
        self._fleet, self._counts = fleet, metrics

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
        if self._fleet.settings.page:
            for path, (name, kind) in FILES.items():
                app.get(path, include_in_schema=False)(_file(PAGE / name, kind))

    async def recommend(self, incoming: Incoming, given: asked.RecommendAsked) -> asked.Recommended:
        """Return the best items for each history."""
        self._check(given.histories, given.k)
        requests = [
            Request(history, given.k, given.exclude_seen, given.allow, given.deny, given.popular_if_empty)
            for history in given.histories
        ]
        one, answers = await self._ask(incoming, given, lambda batcher: batcher.answer(requests), len(requests))
        results = [asked.UserItems(items=_items(answer.items), unknown=answer.unknown) for answer in answers]
        return asked.Recommended(results=results, **_of(one))

    async def vectors(self, incoming: Incoming, given: asked.VectorsAsked) -> asked.Vectors:
        """Return the query vector of each history: what an index of the item vectors is searched with."""
        self._check(given.histories)
        users = len(given.histories)
        one, found = await self._call(incoming, given, lambda engine: engine.vectors(given.histories), users)
        return asked.Vectors(vectors=found, **_of(one))

    async def similar(self, incoming: Incoming, given: asked.SimilarAsked) -> asked.Items:
        """Return the items that are most like one."""
        self._check([], given.k)
        one, found = await self._call(incoming, given, lambda engine: engine.similar(given.item, given.k))
        return asked.Items(items=_items(found), **_of(one))

    async def place(self, incoming: Incoming, given: asked.PlaceAsked) -> asked.Placed:
        """Return where an item that is not in the catalogue would stand in a user's ranking."""
        self._check([given.history], given.k)
        one, found = await self._call(
            incoming, given, lambda engine: engine.place(given.history, given.title, given.text, given.k)
        )
        above, below = _items(found.above), _items(found.below)
        return asked.Placed(rank=found.rank, of=found.of, score=found.score, above=above, below=below, **_of(one))

    async def explain(self, incoming: Incoming, given: asked.ExplainAsked) -> asked.Explained:
        """Return what speaks for an item after a history: each part's share of its score, the nearest items."""
        self._check([given.history])
        one, found = await self._call(incoming, given, lambda engine: engine.explain(given.history, given.item))
        return asked.Explained(
            item=found.item, title=found.title, parts=found.parts, nearest=_items(found.nearest), **_of(one)
        )

    async def compare(self, incoming: Incoming, given: asked.CompareAsked) -> asked.Compared:
        """Return the best items by each part of the recommender alone."""
        self._check([given.history], given.k)
        one, found = await self._call(incoming, given, lambda engine: engine.compare(given.history, given.k))
        parts = {title: _items(items) for title, items in found.items()}
        return asked.Compared(row=one.engine.row, parts=parts, **_of(one))

    async def items(
        self,
        query: Annotated[str, Query(max_length=200, description="Words that the title holds.")] = "",
        limit: Annotated[int, Query(ge=1, le=200)] = FOUND,
        bundle: Annotated[str | None, Query(max_length=40)] = None,
        user: Annotated[str, Query(max_length=200)] = "",
    ) -> asked.FoundItems:
        """Return items whose titles hold all words of a query."""
        one = self._fleet.pick(bundle, user)
        found = await run_in_threadpool(_search, one, query, limit)
        return asked.FoundItems(items=found, **_of(one))

    async def sample(
        self, incoming: Incoming, user: Annotated[str | None, Query(max_length=200)] = None
    ) -> asked.FoundItems:
        """Return the history of a user who might be: items that are bought together."""
        one, items = await self._call(incoming, asked.Asked(user=user), lambda engine: engine.sample())
        return asked.FoundItems(items=[asked.Found(item=item, title=title) for item, title in items], **_of(one))

    async def bundles(self) -> dict[str, Any]:
        """Return what is served: names, rows, versions, shares."""
        return {"bundles": self._fleet.state()}

    async def health(self) -> dict[str, str]:
        """Return whether the process answers."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Return whether every bundle serves; 503 if not."""
        ready, state = self._fleet.ready, self._fleet.state().items()
        bundles = {name: {field: one[field] for field in ("loaded", "trouble")} for name, one in state}
        # with tokens, /v1/bundles alone tells more: troubles name paths, and nobody needs a token here
        details = {} if self._fleet.settings.tokens else {"bundles": bundles}
        return JSONResponse({"ready": ready, **details}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """Return the metrics, in Prometheus's form."""
        self._counts.waiting.set(self._fleet.waiting)
        return Response(self._counts.text(), media_type="text/plain; version=0.0.4")

    async def _call(
        self, incoming: Incoming, given: asked.Asked, work: Callable[[Engine], Any], users: int = 1
    ) -> tuple[Loaded, Any]:
        def submit(batcher: Batcher) -> "Future[Any]":
            return batcher.call(lambda: work(batcher.engine), users)

        return await self._ask(incoming, given, submit, users)

    async def _ask(
        self, incoming: Incoming, given: asked.Asked, submit: Callable[[Batcher], "Future[Any]"], users: int
    ) -> tuple[Loaded, Any]:
        """Have a bundle work; return it and the result. All of an answer is from one bundle."""
        note: dict[str, Any] = incoming.scope["rarec"]
        note["users"] = users
        while True:
            one = self._fleet.pick(given.bundle, given.user if given.user is not None else note["id"])
            try:
                future = submit(one.batcher)
                break
            except Closed:  # another bundle has just taken its place
                await asyncio.sleep(0)
        note["bundle"], note["version"] = one.name, one.engine.version[:12]
        return one, await asyncio.wait_for(asyncio.wrap_future(future), self._fleet.settings.timeout)

    def _check(self, histories: Sequence[History], k: int = 1) -> None:
        """Refuse what is beyond the limits of the settings."""
        limits = self._fleet.settings
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
    on(NotOffered, lambda error: problem(501, str(error), "rarec serve --backend torch"))
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


def _search(one: Loaded, query: str, limit: int) -> list[asked.Found]:
    words = query.casefold().split()
    rows = (row for row, title in enumerate(one.folded) if all(word in title for word in words))
    engine = one.engine
    return [asked.Found(item=engine.ids[row], title=engine.titles[row]) for row in islice(rows, limit)]


def _items(found: Sequence[Recommended]) -> list[asked.Item]:
    return [asked.Item(item=one.item, title=one.title, score=one.score) for one in found]


def _of(one: Loaded) -> dict[str, str]:
    return {"bundle": one.name, "version": one.engine.version[:12]}


def _file(path: Path, kind: str) -> Callable[[], Any]:
    content = path.read_bytes()

    async def answer() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8")

    return answer
