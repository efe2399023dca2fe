"""A bundle: one folder that is a whole recommender, but for the frozen language model. No pickle.

| file | what is in it |
| --- | --- |
| `manifest.json` | sha256 of every file; settings, inputs, figures of this row and of its rivals |
| `recommender.json` | the row that is served, weights of its parts, prompt, language model: what it takes to score |
| `items.parquet` | id, title, text and number of training interactions of every item |
| `vectors.safetensors` | item vectors: of the variant (`model`), and of every ID model (`ids/NAME`) |
| `encoders.safetensors` | weights of the ID models that read histories |
| `alignment.safetensors`, `lora/` | the trained weights of the variant |
| `neighbours/NAME.parquet` | neighbour tables |

Shape letters: N catalogue, Z size of a scored vector, E source dimension.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from rarec.config import MODEL_SECTIONS, RunConfig, Variant
from rarec.config.ids import Ids, Recipe
from rarec.config.load import validated
from rarec.config.neighbours import built_in
from rarec.config.registry import KINDS
from rarec.config.schema import Prepare
from rarec.config.section import Count, Section
from rarec.data.tables import read_columns
from rarec.errors import UserError
from rarec.ids.source import KINDS_OF_USERS, Source, users_of
from rarec.models.build import SourceShape
from rarec.neighbours.base import read_table
from rarec.storage.artefacts import check_files, read_manifest
from rarec.storage.files import read_json

ITEMS, VECTORS, ENCODERS = "items.parquet", "vectors.safetensors", "encoders.safetensors"
TABLES, LLM = "neighbours", "llm"
"""Folders: of the neighbour tables, and of the language model, if the bundle was exported with it."""
MODEL, IDS = "model", "ids/"
"""Names in `vectors.safetensors`: the variant's item vectors, and those of ID models."""
FACTS = "recommender.json"
SCHEMA = 1
"""Of `recommender.json`."""
REMEDY = "export it again: rarec export CONFIG --fresh"
PICKLE = "llm.allow_pickle_weights"
"""What must be trusted by name to read a language model that is a pickle."""
Columns = Mapping[str, str]
COLUMNS = ("item_id", "title", "text", "train_count")
"""Of `items.parquet`."""
NO_COLUMNS: Columns = MappingProxyType({})
NOWHERE: Columns = MappingProxyType({"path": "none"})
Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Facts = Mapping[str, Any]
_Sections = dict[str, dict[str, Any]]
_NAMES_CODE = ("alignment_maps", "readouts", "losses")
"""Kinds of parts that the settings of a variant name."""


@dataclass(frozen=True)
class Catalogue:
    """The items that are ranked.

    Attributes:
        ids: (N,) int64 or string, as in the log.
        titles: (N,).
        texts: (N,), "" where there is none.
        counts_N: number of training interactions.
    """

    ids: pa.Array
    titles: list[str]
    texts: list[str]
    counts_N: npt.NDArray[np.int64]

    @property
    def table(self) -> pa.Table:
        """The rows of `items.parquet`."""
        columns = (self.ids, self.titles, self.texts, self.counts_N)
        return pa.table(dict(zip(COLUMNS, columns, strict=True)))

    @classmethod
    def of(cls, table: pa.Table) -> "Catalogue":
        """Return the items of a table as `table` gives it."""
        ids, titles, texts, counts = (table[name] for name in COLUMNS)
        return cls(ids.combine_chunks(), titles.to_pylist(), texts.to_pylist(), counts.to_numpy())

    def write(self, path: Path) -> None:
        """Write it as Parquet."""
        pq.write_table(self.table, path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> "Catalogue":
        """Read it.

        Raises:
            UserError: it cannot be read, lacks a column, or has an id twice.
        """
        with _reading(path):
            table = read_columns(path).select(COLUMNS)
            ids = table["item_id"]
            if not len(ids) or ids.null_count or len(pc.unique(ids)) < len(ids):
                raise ValueError("an item id is missing or there twice, or there is no item")
            return cls.of(table)


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened; weights and neighbour tables are read when they are first used.

    Attributes:
        directory: where it is.
        manifest: its manifest.
        facts: contents of `recommender.json`.
        trusted: names of parts of the user's own, `package.module:Name`, that it may import.
    """

    directory: Path
    manifest: Mapping[str, Any]
    facts: Facts
    trusted: Collection[str] | None = ()

    @classmethod
    def open(cls, directory: Path, trusted: Collection[str] | None = ()) -> "Bundle":
        """Open a bundle, the only way to read one: its hashes, facts, catalogue and vectors are checked.

        Args:
            directory: where it is.
            trusted: names of parts of the user's own that it may import; None trusts all, as the run that made it does.

        Raises:
            UserError: it is missing or damaged, of another version, or needs a part that is not trusted.
        """
        manifest = read_manifest(directory, "bundle")
        if FACTS not in manifest["files"]:
            raise UserError(f"{directory} was exported by an earlier version: it has no {FACTS}", REMEDY)
        names = dict.fromkeys((FACTS, ITEMS, VECTORS, ENCODERS, *manifest["files"]))
        check_files(directory, manifest, REMEDY, names=names)
        facts: dict[str, Any] = read_json(directory / FACTS, REMEDY)
        schema = facts.get("schema") if isinstance(facts, dict) else None
        if schema != SCHEMA:
            problem = f"{directory / FACTS} has the `schema` {schema}, this version of rarec reads {SCHEMA}"
            raise UserError(problem, f"update rarec, or {REMEDY}")
        validated(_Facts, facts, str(directory / FACTS), remedy=REMEDY)
        for name in own_parts(facts):
            if trusted is not None and name not in trusted:
                problem = f"{directory} needs {name}, which is used only if it is named"
                raise UserError(problem, f"name it, if you trust it: rarec.load(..., trusted=[{name!r}])")
        bundle = cls(directory, manifest, facts, trusted)
        absent = [name for name in bundle.tables if f"{TABLES}/{name}.parquet" not in manifest["files"]]
        if absent:
            raise UserError(f"{directory / FACTS}: part {absent[0]!r} is not in this bundle", REMEDY)
        bundle._check_vectors()
        return bundle

    def _check_vectors(self) -> None:
        """Refuse vectors that are missing, not finite, or of another size or type."""
        count = len(self.catalogue.titles)
        facts = self.facts
        dims: dict[str, int | None] = {IDS + name: source["dim"] for name, source in facts["sources"].items()}
        for name, dim in {**dims, **({MODEL: None} if facts["model"] else {})}.items():
            table = self.vectors.get(name, np.empty(0))
            fits = table.dtype == np.float32 and table.ndim == 2 and table.shape == (count, dim or table.shape[1])
            if not fits or not np.isfinite(table).all():
                wanted = f"finite vectors of type float32 ({count}, {dim or 'any'})"
                raise UserError(f"{self.directory / VECTORS}: table {name!r} does not hold {wanted}", REMEDY)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items that are ranked."""
        return Catalogue.read(self.directory / ITEMS)

    @cached_property
    def vectors(self) -> dict[str, Float32]:
        """Item vectors by name: `model`, `ids/NAME`."""
        tensors = _read(self.directory / VECTORS)
        # numpy has no bfloat16: a table of another type is refused with the shapes
        return {name: tensor.numpy() for name, tensor in tensors.items() if tensor.dtype == torch.float32}

    @cached_property
    def encoders(self) -> dict[str, Tensor]:
        """Weights of the ID models, as `NAME/weight`."""
        return _read(self.directory / ENCODERS)

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Every source of vectors, by name."""
        sources = {}
        for name, facts in self.facts["sources"].items():
            own = {key.removeprefix(f"{name}/"): t for key, t in self.encoders.items() if key.startswith(f"{name}/")}
            users = users_of(facts["users"], recipe_of(facts["users"]), own, str(self.directory))
            sources[name] = Source(name, self.vectors[IDS + name], users, facts["hash"], {})
        return sources

    @property
    def shapes(self) -> dict[str, SourceShape]:
        """Shapes of the sources that slots take."""
        slots = {name: facts for name, facts in self.facts["sources"].items() if "." not in name}
        return {name: SourceShape(facts["dim"], facts["vectors_per_user"]) for name, facts in slots.items()}

    @property
    def tables(self) -> list[str]:
        """Names of the neighbour tables: of the parts that are nothing else."""
        facts = self.facts
        others = {"popularity", facts["model"] and facts["model"]["variant"]["name"]}
        others |= {"id"} if facts["id_model"] in facts["sources"] else set()
        return sorted(set(facts["parts"]) - others)

    def neighbours(self, name: str) -> Any:
        """Return a neighbour table, (N, N) sparse."""
        path = self.directory / TABLES / f"{name}.parquet"
        with _reading(path):  # it may have another table's columns, or rows beyond the catalogue
            return read_table(path, len(self.catalogue.titles))

    def knows_new_items(self, name: str) -> bool:
        """Return whether a neighbour model, or popularity, scores items without training interactions."""
        model = built_in(name)
        own = (self.facts["neighbours"] or {}).get("new_items", ())
        return bool(model.knows_new_items) if model else name in ("popularity", *own)

    @cached_property
    def variant(self) -> Variant:
        """The definition of the variant."""
        return Variant(**self.facts["model"]["variant"])

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of the model; sections that say nothing about it are not those of the run."""
        model = self.facts["model"]
        run = {"dir": "none", "seed": model["seed"]}
        prepare = self.prepare().model_dump(mode="json")
        # nothing but these: other sections may name code, which would be imported
        settings = {name: model["settings"][name] for name in MODEL_SECTIONS if name in model["settings"]}
        settings["train"] = {"blocks": settings["train"]["blocks"]}
        tree = {"run": run, "prepare": prepare, **settings}
        return validated(RunConfig, tree, str(self.directory / FACTS), remedy=REMEDY)

    def prepare(self, interactions: Mapping[str, Any] = NOWHERE, items: Mapping[str, Any] = NOWHERE) -> Prepare:
        """Return how a log or a catalogue is read that is like those that the recommender was trained on.

        Args:
            interactions: path of the log, and names of columns that differ, by field of the configuration.
            items: the same of the catalogue.
        """
        tables = self.facts["tables"]
        order = {"time": None, "position": None} if {"time", "position"} & set(interactions) else {}
        log = {**tables["interactions"], **order, **interactions}
        catalogue = {**tables["items"], **items}
        tree = {**tables, "interactions": log, "items": catalogue}
        return validated(Prepare, tree, str(self.directory / FACTS), remedy=REMEDY)


def _read(path: Path) -> dict[str, Tensor]:
    with _reading(path):
        return load(path.read_bytes())  # not mapped: a mapped file that is cut short would end the process


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file and the remedy where it cannot be read, or does not hold what it should."""
    try:
        yield
    except (OSError, KeyError, ValueError, pa.ArrowException, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}", REMEDY) from None


# ---- `recommender.json`: its sha256 says that it is the file of the manifest, and this, that what is in it fits


class _Part(Section):
    """A part of the row."""

    weight: float
    slope: float


class _Users(BaseModel):
    """How an ID model makes user vectors: a kind with its own fields, or another kind, mapped."""

    kind: str
    inner: "_Users | None" = None

    @model_validator(mode="after")
    def _check_inner(self) -> "_Users":
        if self.kind == "mapped" and self.inner is None:
            raise ValueError("lacks `inner`")
        return self


class _Source(Section):
    """An ID model."""

    users: _Users
    dim: Count
    vectors_per_user: Count
    hash: str


class _Neighbours(Section):
    """How neighbour tables are read."""

    newest: Count
    decay: float
    top: Count
    new_items: list[str] = Field(default=[])
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


class _Tables(Section):
    """How a log and a catalogue are read."""

    interactions: dict[str, Any]
    items: dict[str, Any]
    duplicates: str
    repeats: str


class _Facts(Section):
    version: int = Field(alias="schema")
    row: str
    parts: Annotated[dict[str, _Part], Field(min_length=1)]
    id_model: str
    sources: dict[str, _Source]
    neighbours: _Neighbours | None
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
