"""Check that what a bundle's files say fits together: a sha256 says only that they are the ones of the manifest."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open

from rarec.config import Variant
from rarec.config.load import validated
from rarec.config.registry import KINDS
from rarec.errors import UserError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(gt=0, le=10_000_000)]
Sections = dict[str, dict[str, Any]]
ITEM_COLUMNS = ("item_id", "title", "text", "train_count")
NAMES_CODE = ("alignment_maps", "readouts", "losses")
"""Kinds of parts that the settings of a variant name."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class PartFacts(_Strict):
    """A part of the row."""

    weight: Finite
    slope: Finite


class UsersFacts(BaseModel):
    """How an ID model makes user vectors: a kind with its own fields, or another kind, mapped."""

    kind: str
    inner: "UsersFacts | None" = None

    @model_validator(mode="after")
    def _check_inner(self) -> "UsersFacts":
        if self.kind == "mapped" and self.inner is None:
            raise ValueError("lacks `inner`")
        return self


class SourceFacts(_Strict):
    """An ID model."""

    users: UsersFacts
    dim: Size
    vectors_per_user: Size
    hash: str


class NeighbourFacts(_Strict):
    """How neighbour tables are read."""

    newest: Size
    decay: Finite
    top: Size


def _complete(settings: Sections) -> Sections:
    """Refuse settings without the fields that are read before a configuration is made of them."""
    for field in (*(KINDS[kind].field for kind in NAMES_CODE), "llm.path", "train.blocks"):
        section, name = field.split(".")
        if name not in settings.get(section, {}):
            raise ValueError(f"lacks `{field}`")
    return settings


class LlmFacts(BaseModel):
    """The language model; its other fields are compared with those of the one that is loaded."""

    name: str
    revision: str | None


class ModelFacts(BaseModel):
    """The variant and its language model."""

    model_config = ConfigDict(extra="forbid")  # a strict model takes no dataclass from a dictionary
    variant: Variant
    llm: LlmFacts
    seed: int
    settings: Annotated[Sections, AfterValidator(_complete)]


class TableFacts(_Strict):
    """How a log and a catalogue are read."""

    interactions: dict[str, Any]
    items: dict[str, Any]
    duplicates: str
    repeats: str


class Facts(_Strict):
    """Contents of `recommender.json`."""

    version: int = Field(alias="schema")
    row: str
    parts: Annotated[dict[str, PartFacts], Field(min_length=1)]
    id_model: str
    sources: dict[str, SourceFacts]
    neighbours: NeighbourFacts | None
    batch_size: Size
    tables: TableFacts
    model: ModelFacts | None


def check_facts(path: Path, facts: Any, tables: Iterable[str], remedy: str) -> None:
    """Check `recommender.json`.

    Args:
        path: of the file, for messages.
        facts: its contents.
        tables: names of the bundle's neighbour tables.
        remedy: for messages.

    Raises:
        UserError: a field is missing, unknown or of another type, or a part is not there.
    """
    found = validated(Facts, facts, str(path), remedy=remedy)
    known = {"popularity", *tables}
    known |= {"id"} if found.id_model in found.sources else set()
    known |= {found.model.variant.name} if found.model else set()
    unknown = [name for name in found.parts if name not in known]
    if unknown:
        raise UserError(f"{path}: part {unknown[0]!r} is not in this bundle", remedy)


def check_items(path: Path, remedy: str) -> int:
    """Check `items.parquet`; return the number of items.

    Raises:
        UserError: it cannot be read, lacks a column, or has an id twice.
    """
    try:
        missing = [name for name in ITEM_COLUMNS if name not in pq.read_schema(path).names]
        ids = None if missing else pq.read_table(path, columns=["item_id"])["item_id"]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}", remedy) from None
    if ids is None:
        raise UserError(f"{path} has no column {missing[0]!r}", remedy)
    if not len(ids) or ids.null_count or len(pc.unique(ids)) < len(ids):
        raise UserError(f"{path}: an item id is missing or there twice, or there is no item", remedy)
    return len(ids)


def check_vectors(path: Path, wanted: dict[str, int | None], count: int, remedy: str) -> None:
    """Check the sizes in `vectors.safetensors`; the vectors are not read.

    Args:
        path: of the file.
        wanted: the tables that must be there, with their dimension; None for any.
        count: number of items.
        remedy: for messages.

    Raises:
        UserError: it cannot be read, or a table is missing, or of another size or type.
    """
    try:
        with safe_open(path, "np") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: (of.get_dtype(), *of.get_shape()) for name, of in found.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}", remedy) from None
    for name, dim in wanted.items():
        dtype, *shape = shapes.get(name, ("absent",))
        fits = dtype == "F32" and len(shape) == 2 and shape[0] == count and dim in (None, shape[1])
        if not fits:
            problem = f"{path}: table {name!r} is {dtype} {tuple(shape)}, not F32 ({count}, {dim or 'any'})"
            raise UserError(problem, remedy)
