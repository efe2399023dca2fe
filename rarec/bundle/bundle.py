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

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rarec.bundle.facts import FACTS, REMEDY, Facts, own_parts, read_facts, recipe_of
from rarec.config import MODEL_SECTIONS, RunConfig, Variant
from rarec.config.load import validated
from rarec.config.neighbours import built_in
from rarec.config.schema import Prepare
from rarec.data.tables import read_columns
from rarec.errors import UserError
from rarec.ids.source import Source, users_of
from rarec.models.build import SourceShape
from rarec.neighbours.base import NewItems, read_table
from rarec.storage.artefacts import check_files, read_manifest

ITEMS, VECTORS, ENCODERS = "items.parquet", "vectors.safetensors", "encoders.safetensors"
TABLES, LLM = "neighbours", "llm"
"""Folders: of the neighbour tables, and of the language model, if the bundle was exported with it."""
MODEL, IDS = "model", "ids/"
"""Names in `vectors.safetensors`: the variant's item vectors, and those of ID models."""
Columns = Mapping[str, str]
NO_COLUMNS: Columns = MappingProxyType({})
NOWHERE: Columns = MappingProxyType({"path": "none"})
Float32 = npt.NDArray[np.float32]


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

    def write(self, path: Path) -> None:
        """Write it as Parquet."""
        columns = {"item_id": self.ids, "title": self.titles, "text": self.texts, "train_count": self.counts_N}
        pq.write_table(pa.table(columns), path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> "Catalogue":
        """Read it.

        Raises:
            UserError: it cannot be read, lacks a column, or has an id twice.
        """
        names = ("item_id", "title", "text", "train_count")
        try:
            table = read_columns(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read: {error}", REMEDY) from None
        missing = [name for name in names if name not in table.column_names]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}", REMEDY)
        ids, titles, texts, counts = (table[name] for name in names)
        if not len(ids) or ids.null_count or len(pc.unique(ids)) < len(ids):
            raise UserError(f"{path}: an item id is missing or there twice, or there is no item", REMEDY)
        return cls(ids.combine_chunks(), titles.to_pylist(), texts.to_pylist(), counts.to_numpy())


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened; vectors and tables are read when they are first used.

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
        """Open a bundle, the only way to read one: its hashes, its facts, and the sizes of its tables are checked.

        Args:
            directory: where it is.
            trusted: names of parts of the user's own that it may import; None trusts all, as the run that made it does.

        Raises:
            UserError: it is missing or damaged, of another version, or needs a part that is not trusted.
        """
        manifest = read_manifest(directory, "bundle")
        if FACTS not in manifest["files"]:
            raise UserError(f"{directory} was exported by an earlier version: it has no {FACTS}", REMEDY)
        check_files(directory, manifest, REMEDY)
        facts = read_facts(directory / FACTS, _tables_in(manifest))
        for name in own_parts(facts):
            if trusted is not None and name not in trusted:
                problem = f"{directory} needs {name}, which is used only if it is named"
                raise UserError(problem, f"name it, if you trust it: rarec.load(..., trusted=[{name!r}])")
        bundle = cls(directory, manifest, facts, trusted)
        bundle._check_vectors(len(bundle.catalogue.titles))
        return bundle

    def _check_vectors(self, count: int) -> None:
        """Refuse vectors that are missing, or of another size or type; the vectors themselves are not read."""
        path = self.directory / VECTORS
        facts = self.facts
        dims: dict[str, int | None] = {IDS + name: source["dim"] for name, source in facts["sources"].items()}
        try:
            with safe_open(path, "np") as file:
                tables = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
                kinds = {name: (table.get_dtype(), *table.get_shape()) for name, table in tables.items()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}", REMEDY) from None
        for name, dim in {**dims, **({MODEL: None} if facts["model"] else {})}.items():
            dtype, *shape = kinds.get(name, ("absent",))
            if dtype != "F32" or len(shape) != 2 or shape[0] != count or dim not in (None, shape[1]):
                problem = f"{path}: table {name!r} is {dtype} {tuple(shape)}, not F32 ({count}, {dim or 'any'})"
                raise UserError(problem, REMEDY)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items that are ranked."""
        return Catalogue.read(self.directory / ITEMS)

    @cached_property
    def vectors(self) -> dict[str, Float32]:
        """Item vectors by name: `model`, `ids/NAME`."""
        vectors = {name: tensor.numpy() for name, tensor in _read(self.directory / VECTORS).items()}
        for name, table in vectors.items():
            if not np.isfinite(table).all():
                raise UserError(f"{self.directory / VECTORS}: a vector of {name!r} is not finite", REMEDY)
        return vectors

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
    def holds_llm(self) -> bool:
        """Return whether the language model is inside."""
        return any(Path(file).parent.name == LLM for file in self.manifest["files"])

    @property
    def tables(self) -> list[str]:
        """Names of the neighbour tables."""
        return _tables_in(self.manifest)

    def neighbours(self, name: str) -> Any:
        """Return a neighbour table, (N, N) sparse."""
        path = self.directory / TABLES / f"{name}.parquet"
        try:
            return read_table(path, len(self.catalogue.titles))
        except (ValueError, KeyError) as error:  # another table's columns, rows beyond the catalogue
            raise UserError(f"{path} cannot be read: {error}", REMEDY) from None

    def knows_new_items(self, name: str) -> bool:
        """Return whether a neighbour model, or popularity, scores items without training interactions."""
        model, own = built_in(name), (self.facts["neighbours"] or {}).get("new_items", ())
        return bool(model.knows_new_items) if model else name in ("popularity", *own)

    def new_items(self, name: str) -> NewItems | None:
        """Return what finds the neighbours of new items in a table; None if its model knows none, or is not rarec's."""
        model, known = built_in(name), self.catalogue
        if model is None or not model.knows_new_items:
            return None
        untitled, top = self.facts["tables"]["items"]["untitled"], int(self.facts["neighbours"]["top"])
        found: NewItems = model.new_items(known.titles, known.texts, untitled, self.neighbours(name), top)
        return found

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
        log, catalogue = {**tables["interactions"], **order, **interactions}, {**tables["items"], **items}
        tree = {**tables, "interactions": log, "items": catalogue}
        return validated(Prepare, tree, str(self.directory / FACTS), remedy=REMEDY)


def _tables_in(manifest: Mapping[str, Any]) -> list[str]:
    files = (Path(file) for file in manifest["files"])
    return sorted(file.stem for file in files if file.parent.name == TABLES)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        # copies, because a mapped file that is cut short would end the process
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}", REMEDY) from None
