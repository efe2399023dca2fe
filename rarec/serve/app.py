"""The application: `create` is an ASGI factory for `rarec serve`, gunicorn, Ray Serve or any other server."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response, Security
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse

from rarec.bundle.recommended import Request
from rarec.errors import UserError
from rarec.serve import schemas
from rarec.serve.batcher import Closed
from rarec.serve.bundle_manager import BundleManager, Loaded
from rarec.serve.engines import load_engine
from rarec.serve.guard import Guard
from rarec.serve.impressions import Impressions
from rarec.serve.replies import REFUSED, Reply, fail, refuse, result_of
from rarec.serve.settings import ServeSettings, settings_of_environment
from rarec.serve.shadow import Shadow
from rarec.serve.telemetry import Metrics
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


TOKEN = Security(HTTPBearer(scheme_name="token", auto_error=False, description="One of `tokens`, where there are any."))
"""For the description alone: `Guard` checks it."""


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
    settings = manager.settings.impressions
    impressions = Impressions(settings, metrics) if settings else None

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        manager.start()
        if impressions:
            impressions.start()
        yield {"refuse_early": guard.refuse_early}
        await run_in_threadpool(manager.close)
        if impressions:
            await run_in_threadpool(impressions.close)

    app = FastAPI(title="rarec", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False  # a redirect leads to whatever host the client names
    app.add_exception_handler(Exception, fail)
    for kind, refusal in REFUSED.items():
        app.add_exception_handler(kind, partial(refuse, refusal))
    Service(manager, metrics, impressions).add_to(app)
    guard = Guard(app, manager, metrics)
    return guard, manager


class Service:
    """The routes.

    Args:
        manager: the bundles.
        metrics: of the process.
        impressions: what is shown is noted there, if there are any.
    """

    def __init__(self, manager: BundleManager, metrics: Metrics, impressions: Impressions | None) -> None:
        self._manager, self._metrics, self._impressions = manager, metrics, impressions
        self._shadow = Shadow(manager, metrics)

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
        documented: dict[str, Any] = {"responses": REFUSALS, "dependencies": [TOKEN]}
        for path, route in routes.items():
            app.post(path, **documented)(route)
        app.get("/v1/items", **documented)(self.items)
        app.get("/v1/users/sample", **documented)(self.sample)
        app.get("/v1/bundles", **documented)(self.bundles)
        app.get("/metrics", dependencies=[TOKEN])(self.metrics)
        app.get("/health")(self.health)
        app.get("/ready")(self.ready)
        if self._manager.settings.page:
            for path, (name, kind) in FILES.items():
                app.get(path, include_in_schema=False)(_page(PAGE / name, kind))

    async def recommend(self, incoming: Incoming, request: schemas.RecommendRequest) -> schemas.Recommended:
        """Return the best items for each history."""
        options = request.model_dump(exclude={"histories", "bundle", "user"})
        requests = [Request(history, **options) for history in request.histories]
        reply = await self._ask(incoming, request, lambda loaded, end: loaded.batcher.answer(requests, end))
        self._shadow.ask(reply.loaded, requests, reply.result)
        if self._impressions:
            self._impressions.add(reply.source, request.user, reply.result, schemas.rules(request))
        unknown = reply.result[0].unknown_in_rules  # all users have the same rules
        return schemas.Recommended(results=reply.result, unknown_in_rules=unknown, **reply.source)

    async def vectors(self, incoming: Incoming, request: schemas.VectorsRequest) -> schemas.Vectors:
        """Return the query vector of each history: what an index of the item vectors is searched with."""
        reply = await self._call(incoming, request, lambda bundle: bundle.engine.vectors(request.histories))
        return schemas.Vectors(vectors=reply.result, **reply.source)

    async def similar(self, incoming: Incoming, request: schemas.SimilarRequest) -> schemas.Items:
        """Return the items that are most like one."""
        item, k = request.item, request.k
        reply = await self._call(incoming, request, lambda bundle: bundle.engine.recommender.similar(item, k))
        return schemas.Items(items=reply.result, **reply.source)

    async def place(self, incoming: Incoming, request: schemas.PlaceRequest) -> schemas.Placed:
        """Return where an item that is not in the catalogue would stand in a user's ranking."""
        new = request.history, request.title, request.text, request.k
        reply = await self._call(incoming, request, lambda bundle: bundle.engine.recommender.place(*new))
        return schemas.Placed(**vars(reply.result), **reply.source)

    async def explain(self, incoming: Incoming, request: schemas.ExplainRequest) -> schemas.Explained:
        """Return the evidence for an item after a history: each part's share of its score, the nearest items."""
        history, item = request.history, request.item
        reply = await self._call(incoming, request, lambda bundle: bundle.engine.recommender.explain(history, item))
        return schemas.Explained(**vars(reply.result), **reply.source)

    async def compare(self, incoming: Incoming, request: schemas.CompareRequest) -> schemas.Compared:
        """Return the best items by each part of the recommender alone."""
        history, k = request.history, request.k
        reply = await self._call(incoming, request, lambda bundle: bundle.engine.recommender.compare(history, k))
        return schemas.Compared(row=reply.loaded.engine.row, parts=reply.result, **reply.source)

    async def items(
        self,
        incoming: Incoming,
        query: Annotated[str, Query(max_length=200, description="Words that the title holds.")] = "",
        limit: Annotated[int, Query(ge=1, le=200)] = FOUND,
        bundle: Annotated[str | None, Query(max_length=40, pattern=schemas.BUNDLE_NAME)] = None,
        user: Annotated[str, Query(max_length=200)] = "",
    ) -> schemas.FoundItems:
        """Return items whose titles hold all words of a query."""
        request = schemas.BaseRequest(bundle=bundle, user=user)
        return _found(await self._call(incoming, request, lambda loaded: loaded.find(query, limit)))

    async def sample(
        self, incoming: Incoming, user: Annotated[str | None, Query(max_length=200)] = None
    ) -> schemas.FoundItems:
        """Return the history of a user who might be: items that are bought together."""
        request = schemas.BaseRequest(user=user)
        return _found(await self._call(incoming, request, lambda bundle: bundle.engine.recommender.sample_user()))

    async def bundles(self) -> dict[str, Any]:
        """Return what is served: names, rows, versions, shares."""
        return {"bundles": self._manager.state()}

    async def health(self) -> dict[str, str]:
        """Return whether the process answers."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Return whether every bundle serves; 503 if not."""
        ready, overloaded = self._manager.ready, self._manager.overload > 0
        state = self._manager.state().items()
        bundles = {name: {field: facts[field] for field in ("loaded", "trouble")} for name, facts in state}
        # with tokens, /v1/bundles alone tells more: troubles name paths, and nobody needs a token here
        details = {} if self._manager.settings.tokens else {"bundles": bundles}
        return JSONResponse({"ready": ready, "overloaded": overloaded, **details}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """Return the metrics, in Prometheus's form."""
        self._metrics.waiting.set(self._manager.waiting)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _call(self, incoming: Incoming, request: schemas.BaseRequest, work: Callable[[Loaded], Any]) -> Reply:
        """Have a bundle work for the users of a request."""
        users = len(request.all_histories)
        return await self._ask(
            incoming, request, lambda loaded, end: loaded.batcher.call(partial(work, loaded), end, users)
        )

    async def _ask(
        self, incoming: Incoming, request: schemas.BaseRequest, submit: Callable[[Loaded, float], "Future[Any]"]
    ) -> Reply:
        """Submit a request that is within the limits, and its deadline; return the result: all is from one bundle."""
        self._check(request)
        note, deadline = incoming.scope["rarec"], incoming.scope["rarec.deadline"]
        note["users"] = len(request.all_histories)
        while True:
            loaded = self._manager.pick(request.bundle, request.user if request.user is not None else note["id"])
            try:
                future = submit(loaded, deadline)
                break
            except Closed:  # another bundle has just taken its place
                await asyncio.sleep(0)
        note |= loaded.source
        return Reply(note["id"], loaded, await result_of(incoming, loaded, future, deadline))

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


def _found(reply: Reply) -> schemas.FoundItems:
    engine = reply.loaded.engine
    items = [schemas.Found(item=engine.ids[row], title=engine.titles[row]) for row in reply.result]
    return schemas.FoundItems(items=items, **reply.source)


def _page(file: Path, kind: str) -> Callable[[], Any]:
    """Return what answers with a file of the page, as it is when the service starts."""
    content = file.read_bytes()

    async def page() -> Response:  # a plain function would wait for a thread
        return Response(content, media_type=f"{kind}; charset=utf-8")

    return page
