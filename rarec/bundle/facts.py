"""`recommender.json`, the facts of a bundle: what it takes to score, checked field by field.

A sha256 says only that a file is the one of the manifest; this says that what is in it fits together.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rarec.config import Variant
from rarec.config.ids import Ids, Recipe
from rarec.config.load import validated
from rarec.config.registry import KINDS
from rarec.errors import UserError
from rarec.ids.source import KINDS_OF_USERS
from rarec.storage.files import read_json

FACTS = "recommender.json"
SCHEMA = 1
"""Of `recommender.json`."""
REMEDY = "export it again: rarec export CONFIG --fresh"
PICKLE = "llm.allow_pickle_weights"
"""What must be trusted by name to read a language model that is a pickle."""
Facts = Mapping[str, Any]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Size = Annotated[int, Field(gt=0, le=10_000_000)]
_Sections = dict[str, dict[str, Any]]
_NAMES_CODE = ("alignment_maps", "readouts", "losses")
"""Kinds of parts that the settings of a variant name."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Part(_Strict):
    """A part of the row."""

    weight: _Finite
    slope: _Finite


class _Users(BaseModel):
    """How an ID model makes user vectors: a kind with its own fields, or another kind, mapped."""

    kind: str
    inner: "_Users | None" = None

    @model_validator(mode="after")
    def _check_inner(self) -> "_Users":
        if self.kind == "mapped" and self.inner is None:
            raise ValueError("lacks `inner`")
        return self


class _Source(_Strict):
    """An ID model."""

    users: _Users
    dim: _Size
    vectors_per_user: _Size
    hash: str


class _Neighbours(_Strict):
    """How neighbour tables are read."""

    newest: _Size
    decay: _Finite
    top: _Size
    new_items: list[str] = []
    """Models of the user's own that know new items."""


def _complete(settings: _Sections) -> _Sections:
    """Refuse settings without the fields that are read before a configuration is made of them."""
    for field in (*(KINDS[kind].field for kind in _NAMES_CODE), "llm.path", "train.blocks"):
        section, name = field.split(".")
        if name not in settings.get(section, {}):
            raise ValueError(f"lacks `{field}`")
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
    seed: int
    settings: Annotated[_Sections, AfterValidator(_complete)]


class _Tables(_Strict):
    """How a log and a catalogue are read."""

    interactions: dict[str, Any]
    items: dict[str, Any]
    duplicates: str
    repeats: str


class _Facts(_Strict):
    version: int = Field(alias="schema")
    row: str
    parts: Annotated[dict[str, _Part], Field(min_length=1)]
    id_model: str
    sources: dict[str, _Source]
    neighbours: _Neighbours | None
    batch_size: _Size
    tables: _Tables
    model: _Model | None


def read_facts(path: Path, tables: Iterable[str]) -> Facts:
    """Read and check `recommender.json`.

    Args:
        path: of the file.
        tables: names of the bundle's neighbour tables.

    Raises:
        UserError: it is not JSON or of another schema; a field is missing, unknown or of another type; a part of the
            row is not in the bundle.
    """
    facts: dict[str, Any] = read_json(path, REMEDY)
    schema = facts.get("schema") if isinstance(facts, dict) else None
    if schema != SCHEMA:
        problem = f"{path} has schema {schema}, this version of rarec reads {SCHEMA}"
        raise UserError(problem, "update rarec, or export it again")
    checked = validated(_Facts, facts, str(path), remedy=REMEDY)
    known = {"popularity", *tables}
    known |= {"id"} if checked.id_model in checked.sources else set()
    known |= {checked.model.variant.name} if checked.model else set()
    unknown = [name for name in checked.parts if name not in known]
    if unknown:
        raise UserError(f"{path}: part {unknown[0]!r} is not in this bundle", REMEDY)
    return facts


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
