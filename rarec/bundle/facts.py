"""The facts of a bundle, `recommender.json`: a strict schema with ranges, and what of them names code.

The sha256 in the manifest says that it is the file that was written; this, that what is in it fits.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from rarec.config import Variant
from rarec.config.ids import RECIPES, Ids, Recipe
from rarec.config.registry import KINDS
from rarec.config.section import Count, Positive, Rate, Section, Seed, Share
from rarec.ids.source import KINDS_OF_USERS

SCHEMA = 3
"""Of `recommender.json`."""
PICKLE = "llm.allow_pickle_weights"
"""What must be trusted by name to read a language model that is a pickle."""
Facts = Mapping[str, Any]
_Sections = dict[str, dict[str, Any]]
_NAMES_CODE = ("alignment_maps", "readouts", "losses")
"""Kinds of parts that the settings of a variant name."""


class _Part(Section):
    """A part of the row."""

    weight: Annotated[float, Field(ge=-1e6, le=1e6)]
    new_weight: Annotated[float, Field(ge=-1e6, le=1e6)]


class _Rule(Section):
    """User vectors by a weighted mean; see `HistoryRule`."""

    rule: Literal["mean", "last", "recency"]
    half_life: Rate
    max_history: Positive


class _Mapped(Section):
    """User vectors of another ID model, mapped; see `MappedUsers`."""

    inner: "_Users"


class _Users(BaseModel):
    """How an ID model makes user vectors: a kind, and its settings.

    Those of an ID model of the user's own are checked by its `Config`, which is imported only if it is trusted.
    """

    model_config = ConfigDict(extra="allow")
    kind: str

    @model_validator(mode="after")
    def _check_settings(self) -> "_Users":
        schemas: dict[str, type[Section]] = {**RECIPES, "rule": _Rule, "mapped": _Mapped}
        if self.kind == "table":
            raise ValueError("a table of users serves no other user")
        if self.kind in schemas:
            try:
                schemas[self.kind].model_validate(self.model_extra)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None
        return self


class _Source(Section):
    """An ID model."""

    users: _Users
    dim: Positive
    vectors_per_user: Positive
    hash: str

    @model_validator(mode="after")
    def _check_dim(self) -> "_Source":
        own = (self.users.model_extra or {}).get("dim", self.dim)
        if own != self.dim:
            raise ValueError(f"`users.dim` is {own}, and `dim` is {self.dim}")
        return self


class _Neighbours(Section):
    """How neighbour tables are read."""

    newest: Positive
    decay: Share
    top: Positive


def _complete(settings: _Sections) -> _Sections:
    """Refuse settings without the fields that are read before a configuration is made of them."""
    for field in (*(KINDS[kind].field for kind in _NAMES_CODE), "llm.path", "train.blocks"):
        section, name = field.split(".")
        if name not in settings.get(section, {}):
            raise ValueError(f"lacks `{field}`")
        if section != "train" and not isinstance(settings[section][name], str):
            raise ValueError(f"`{field}` is no text")
    return settings


class _Llm(BaseModel):
    """The language model; its other fields are compared with those of the one that is loaded."""

    name: str
    revision: str | None


class _Model(BaseModel):
    """The variant and its language model."""

    model_config = ConfigDict(extra="forbid")  # a strict model takes no dataclass from a dictionary
    variant: Variant
    llm: _Llm
    seed: Seed
    settings: Annotated[_Sections, AfterValidator(_complete)]


class _Asked(Section):
    """How the row was evaluated; see `Asked`."""

    exclude_seen: bool
    max_history: Positive | None


class _Items(BaseModel):
    """A table of items, which says what replaces a missing title; `Prepare` checks its other fields."""

    untitled: str


class _Tables(Section):
    """How a log and a catalogue are read."""

    interactions: dict[str, Any]
    items: _Items
    duplicates: str
    repeats: str


class BundleFacts(Section):
    """All facts; see `rarec.bundle.write`."""

    version: int = Field(alias="schema")
    row: str
    parts: Annotated[dict[str, _Part], Field(min_length=1)]
    id_model: str
    sources: dict[str, _Source]
    neighbours: _Neighbours | None
    asked: _Asked
    batch_size: Count
    tables: _Tables
    model: _Model | None


def own_parts(facts: Facts) -> list[str]:
    """Return what the facts name that is used only if it is trusted: the user's own code, a pickle."""
    kinds = [_inner(source["users"])["kind"] for source in facts["sources"].values()]
    names = [kind for kind in kinds if kind not in KINDS_OF_USERS]
    settings = facts["model"]["settings"] if facts["model"] else {}
    for kind in _NAMES_CODE if settings else ():
        section, field = KINDS[kind].field.split(".")
        if settings[section][field] not in KINDS[kind].built_in:
            names.append(settings[section][field])
    if settings and settings["llm"].get("allow_pickle_weights"):
        names.append(PICKLE)
    return names


def recipe_of(users: Mapping[str, Any]) -> Recipe | None:
    """Return the settings of an ID model of the user's own; None for the others, which need none."""
    settings = dict(_inner(users))
    kind = settings.pop("kind")
    return Ids(model=kind, settings=settings).recipe if kind not in KINDS_OF_USERS else None


def _inner(users: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how user vectors are made before they are mapped."""
    return _inner(users["inner"]) if users["kind"] == "mapped" else users
