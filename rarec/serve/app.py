"""The application: `create` is an ASGI factory for `rarec serve`, gunicorn, Ray Serve or any other server."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as Incoming
from starlette.responses import JSONResponse

from rarec.bundle.recommended import Request
from rarec.errors import UserError
from rarec.serve import schemas
from rarec.serve.batcher import Closed, Late
from rarec.serve.bundle_manager import BundleManager, Loaded, Shadow
from rarec.serve.engines import load_recommender
from rarec.serve.guard import Guard
from rarec.serve.impressions import Impressions
from rarec.serve.refusals import Refused, refuse
from rarec.serve.settings import ServeSettings, settings_of_environment
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
    status: {"model": schemas.Problem} for status in (401, 404, 413, 421, 422, 429, 501, 503)
}
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
    manager = BundleManager(read, load_recommender, metrics)
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
    for kind in (HTTPException, RequestValidationError, UserError, Exception):
        app.add_exception_handler(kind, refuse)
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
        answers, loaded, source = await self._ask(
            incoming, request, lambda loaded, end: loaded.batcher.answer(requests, end)
        )
        self._shadow.ask(loaded, requests, answers)
        if self._impressions:
            self._impressions.add(source, request.user, answers, schemas.rules(request))
        unknown = answers[0].unknown_in_rules  # all users have the same rules
        return schemas.Recommended(results=answers, unknown_in_rules=unknown, **source)

    async def vectors(self, incoming: Incoming, request: schemas.VectorsRequest) -> schemas.Vectors:
        """Return the query vector of each history: what an index of the item vectors is searched with."""
        histories = request.histories
        vectors, source = await self._call(
            incoming, request, lambda bundle: bundle.recommender.query_vectors(histories)
        )
        return schemas.Vectors(vectors=vectors.tolist(), **source)

    async def similar(self, incoming: Incoming, request: schemas.SimilarRequest) -> schemas.Items:
        """Return the items that are most like one."""
        item, k = request.item, request.k
        items, source = await self._call(incoming, request, lambda bundle: bundle.recommender.similar(item, k))
        return schemas.Items(items=items, **source)

    async def place(self, incoming: Incoming, request: schemas.PlaceRequest) -> schemas.Placed:
        """Return where an item that is not in the catalogue would stand in a user's ranking."""
        new = request.history, request.title, request.text, request.k
        place, source = await self._call(incoming, request, lambda bundle: bundle.recommender.place(*new))
        return schemas.Placed(**vars(place), **source)

    async def explain(self, incoming: Incoming, request: schemas.ExplainRequest) -> schemas.Explained:
        """Return the evidence for an item after a history: each part's share of its score, the nearest items."""
        history, item = request.history, request.item
        evidence, source = await self._call(incoming, request, lambda bundle: bundle.recommender.explain(history, item))
        return schemas.Explained(**vars(evidence), **source)

    async def compare(self, incoming: Incoming, request: schemas.CompareRequest) -> schemas.Compared:
        """Return the best items by each part of the recommender alone."""
        history, k = request.history, request.k
        (row, parts), source = await self._call(
            incoming, request, lambda bundle: (bundle.recommender.row, bundle.recommender.compare(history, k))
        )
        return schemas.Compared(row=row, parts=parts, **source)

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
        items, source = await self._call(incoming, request, lambda bundle: _found(bundle, bundle.find(query, limit)))
        return schemas.FoundItems(items=items, **source)

    async def sample(
        self, incoming: Incoming, user: Annotated[str | None, Query(max_length=200)] = None
    ) -> schemas.FoundItems:
        """Return the history of a user who might be: items that are bought together."""
        request = schemas.BaseRequest(user=user)
        items, source = await self._call(
            incoming, request, lambda bundle: _found(bundle, bundle.recommender.sample_user())
        )
        return schemas.FoundItems(items=items, **source)

    async def bundles(self) -> dict[str, Any]:
        """Return what is served: names, rows, versions, shares."""
        return {"bundles": self._manager.state()}

    async def health(self) -> dict[str, str]:
        """Return whether the process answers."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Return whether every bundle serves; 503 if not."""
        ready, overloaded = self._manager.ready, self._manager.overload > 0
        # with tokens, /v1/bundles alone tells more: troubles name paths, and nobody needs a token here
        details = {} if self._manager.settings.tokens else await self.bundles()
        return JSONResponse({"ready": ready, "overloaded": overloaded, **details}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """Return the metrics, in Prometheus's form."""
        self._metrics.waiting.set(self._manager.waiting)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _call(
        self, incoming: Incoming, request: schemas.BaseRequest, work: Callable[[Loaded], Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Have a bundle work for the users of a request; return the result, and what every answer says of itself."""
        users = len(request.all_histories)
        result, _, source = await self._ask(
            incoming, request, lambda loaded, end: loaded.batcher.call(partial(work, loaded), end, users)
        )
        return result, source

    async def _ask(
        self, incoming: Incoming, request: schemas.BaseRequest, submit: Callable[[Loaded, float], "Future[Any]"]
    ) -> tuple[Any, Loaded, dict[str, Any]]:
        """Submit a request, with its deadline; return the result, the bundle, and what every answer says of itself."""
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
        result = await _result_of(incoming, loaded, future, deadline)
        return result, loaded, {"id": note["id"], **loaded.source}

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


async def _result_of(incoming: Incoming, loaded: Loaded, future: "Future[Any]", deadline: float) -> Any:
    """Return the result of a job, which ends with its deadline, or when its client leaves."""
    result, left = asyncio.wrap_future(future), asyncio.ensure_future(_client_left(incoming))
    try:
        await asyncio.wait({result, left}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        if left.done():
            raise Refused(499, "the client has left", "wait for the answer", "client_left")
        raise Late(loaded.batcher.backlog)
    finally:
        result.cancel()
        left.cancel()


async def _client_left(incoming: Incoming) -> None:
    while (await incoming.receive())["type"] != "http.disconnect":
        pass


def _found(loaded: Loaded, rows: list[int]) -> list[schemas.Found]:
    ids, titles = loaded.recommender.items, loaded.recommender.catalogue.titles
    return [schemas.Found(item=ids[row], title=titles[row]) for row in rows]


def _page(file: Path, kind: str) -> Callable[[], Any]:
    """Return what answers with a file of the page, as it is when the service starts."""
    content = file.read_bytes()

    async def page() -> Response:  # a plain function would wait for a thread
        return Response(content, media_type=f"{kind}; charset=utf-8")

    return page
