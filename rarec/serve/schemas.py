"""Schemas of requests and answers. A request of another form is refused with 422 and the name of the field."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, StrictBool, StrictInt, StrictStr

from rarec.bundle.recommended import Id

SAFE_INTEGER = 2**53
# pydantic refuses half a character of UTF-16, which no answer could carry back, where a length is limited
Text = Annotated[StrictStr, Field(max_length=1000)]
ItemId = Annotated[
    Annotated[StrictStr, Field(max_length=256)] | Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)],
    Field(examples=["sku-1"]),
]
History = Annotated[list[ItemId], Field(description="Ids of items, oldest first.", examples=[["sku-1", "sku-7"]])]
K = Annotated[StrictInt, Field(ge=1, le=100_000, description="Number of items.")]
BUNDLE_NAME = "^[A-Za-z0-9._-]*$"


class BaseRequest(BaseModel):
    """The fields of every request."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    bundle: Annotated[StrictStr | None, Field(max_length=40, pattern=BUNDLE_NAME)] = None
    """Name of the bundle that answers; by default by share."""
    user: Text | None = None
    """Any key of the user: the same key gets the same bundle. It is not stored or logged."""

    @property
    def all_histories(self) -> list[list[Id]]:
        """The histories in it: those of several users, that of one, or an empty one."""
        histories: list[list[Id]] = getattr(self, "histories", [getattr(self, "history", [])])
        return histories


class VectorsRequest(BaseRequest):
    """`POST /v1/users/vector`."""

    histories: Annotated[list[History], Field(min_length=1)]
    """One for each user."""


class RecommendRequest(VectorsRequest):
    """`POST /v1/recommend`."""

    k: K = 10
    exclude_seen: StrictBool | None = None
    """Whether the items of the history are left out; by default as the row was evaluated."""
    allow: list[ItemId] | None = None
    """The only items that may be returned."""
    deny: list[ItemId] = []
    """Items that may not be returned."""
    where: Annotated[StrictStr | None, Field(max_length=10_000, examples=[None])] = None
    """Only items for which this condition on columns is true: `in_stock = true and category in ('lamps', 'chairs')`."""
    diversify: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.0
    """How much the likeness of items within a list counts against them."""
    fallback: Literal["popularity", "recent", "none"] = "popularity"
    """What an empty history gets, and what fills a list that the model leaves short."""


def rules(request: RecommendRequest) -> dict[str, Any]:
    """Return what a request asks for that is not so by default; of long lists their length and hash."""
    given = request.model_dump(exclude={"histories", "bundle", "user"}, exclude_defaults=True)
    return {name: _in_short(value) if isinstance(value, list) else value for name, value in given.items()}


def _in_short(items: list[Id]) -> dict[str, Any]:
    return {"items": len(items), "sha256": hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16]}


class SimilarRequest(BaseRequest):
    """`POST /v1/items/similar`."""

    item: ItemId
    k: K = 10


class ExplainRequest(BaseRequest):
    """`POST /v1/explain`."""

    history: History
    item: ItemId


class CompareRequest(BaseRequest):
    """`POST /v1/compare`."""

    history: History
    k: K = 10


class PlaceRequest(BaseRequest):
    """`POST /v1/items/place`."""

    history: History
    title: Text
    text: Text = ""
    k: K = 3


def _safe(item: Id) -> Id:
    """Return an id as text where JavaScript would round the number."""
    return str(item) if isinstance(item, int) and abs(item) > SAFE_INTEGER else item


AnswerId = Annotated[Id, PlainSerializer(_safe), Field(description="Text beyond 2^53, which requests take as well.")]


class AnswerModel(BaseModel):
    """What answers are made of."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)


class Found(AnswerModel):
    """One item, without a score."""

    item: AnswerId
    title: str


class Item(Found):
    """One item of an answer."""

    score: float


class BaseAnswer(AnswerModel):
    """The fields of every answer: its id, by which clicks are counted, and the bundle that gave it."""

    id: str
    """Also the header `x-request-id`."""
    bundle: str
    version: str


class UserItems(AnswerModel):
    """What one user gets."""

    items: list[Item]
    unknown: int
    """Ids of the history that the catalogue lacks; they were skipped."""


class Recommended(BaseAnswer):
    """Answer of `/v1/recommend`."""

    results: list[UserItems]
    unknown_in_rules: list[AnswerId]
    """Ids in `allow` and `deny` that were skipped."""


class Vectors(BaseAnswer):
    """Answer of `/v1/users/vector`: (F,) of each user, or (K, F) where the best of K scores counts."""

    vectors: list[Any]


class FoundItems(BaseAnswer):
    """Answer of `/v1/items` and `/v1/users/sample`."""

    items: list[Found]


class Items(BaseAnswer):
    """Answer of `/v1/items/similar`."""

    items: list[Item]


class Explained(BaseAnswer):
    """Answer of `/v1/explain`."""

    item: AnswerId
    title: str
    parts: dict[str, float]
    """What each part adds to the score, beside the average item."""
    nearest: list[Item]
    """Items of the history that are most like it."""


class Compared(BaseAnswer):
    """Answer of `/v1/compare`."""

    row: str
    parts: dict[str, list[Item]]
    """The best items by each part alone."""


class Placed(BaseAnswer):
    """Answer of `/v1/items/place`."""

    rank: int
    of: int
    score: float
    above: list[Item]
    below: list[Item]


class Problem(BaseModel):
    """What is wrong, and what to do."""

    problem: str
    remedy: str
