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
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rarec.bundle.checks import NAMES_CODE, check_facts, check_items, check_vectors
from rarec.config import MODEL_SECTIONS, RunConfig, Variant
from rarec.config.ids import Ids, Recipe
from rarec.config.load import validated
from rarec.config.logs import Prepare
from rarec.config.registry import KINDS
from rarec.data.tables import read_columns
from rarec.errors import UserError
from rarec.ids.source import KINDS_OF_USERS, Source, users_of
from rarec.models.build import SourceShape
from rarec.neighbours.table import read_table
from rarec.storage.artefacts import check_files, read_manifest
from rarec.storage.files import read_json

FACTS, ITEMS, VECTORS, ENCODERS, TABLES = (
    "recommender.json",
    "items.parquet",
    "vectors.safetensors",
    "encoders.safetensors",
    "neighbours",
)
LLM = "llm"
"""Folder of the language model, if the bundle was exported with it."""
SCHEMA = 1
"""Of `recommender.json`."""
MODEL, IDS = "model", "ids/"
"""Names in `vectors.safetensors`: the variant's item vectors, and those of ID models."""
FIGURES = ("row", "why", "metrics", "trained_parameters")
"""Fields of the manifest for the reader."""
PICKLE = "llm.allow_pickle_weights"
"""What must be trusted by name to read a language model that is a pickle."""
_AGAIN = "export it again: rarec export CONFIG --fresh"
LOG, CATALOGUE = ("user", "item", "time", "position"), ("item", "title", "text")
"""Roles of the columns of a log, and of a catalogue."""
NO_COLUMNS: Mapping[str, str] = MappingProxyType({})
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


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened; what is large is read when it is asked for.

    Attributes:
        directory: where it is.
        manifest: its manifest.
        facts: contents of `recommender.json`.
        trusted: names of parts of the user's own, `package.module:Name`, that it may import.
    """

    directory: Path
    manifest: Mapping[str, Any]
    facts: Mapping[str, Any]
    trusted: Collection[str] = ()

    @classmethod
    def open(cls, directory: Path, trusted: Collection[str] = ()) -> "Bundle":
        """Open a bundle, and check every file of it.

        Raises:
            UserError: it is missing or damaged, of another version, or needs a part that is not trusted.
        """
        manifest = read_manifest(directory, "bundle")
        if FACTS not in manifest["files"]:
            raise UserError(f"{directory} was exported by an earlier version: it has no {FACTS}", _AGAIN)
        check_files(directory, manifest, _AGAIN)
        facts = read_json(directory / FACTS, _AGAIN)
        schema = facts.get("schema") if isinstance(facts, dict) else None
        if schema != SCHEMA:
            problem = f"{directory / FACTS} has schema {schema}, this version of rarec reads {SCHEMA}"
            raise UserError(problem, "update rarec, or export it again")
        opened = cls(directory, manifest, facts, trusted)
        check_facts(directory / FACTS, facts, opened.tables_there, _AGAIN)
        for name in _parts_of(facts):
            if name not in trusted:
                problem = f"{directory} needs {name}, which is used only if it is named"
                raise UserError(problem, f"name it, if you trust it: rarec.load(..., trusted=[{name!r}])")
        count = check_items(directory / ITEMS, _AGAIN)
        wanted: dict[str, int | None] = {IDS + name: of["dim"] for name, of in facts["sources"].items()}
        check_vectors(directory / VECTORS, wanted | ({MODEL: None} if facts["model"] else {}), count, _AGAIN)
        return opened

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items that are ranked."""
        table = read_columns(self.directory / ITEMS)
        titles, texts = (table[name].to_pylist() for name in ("title", "text"))
        return Catalogue(table["item_id"].combine_chunks(), titles, texts, table["train_count"].to_numpy())

    @cached_property
    def vectors(self) -> dict[str, Float32]:
        """Item vectors by name: `model`, `ids/NAME`."""
        found = {name: tensor.numpy() for name, tensor in _read(self.directory / VECTORS).items()}
        for name, table in found.items():
            if not np.isfinite(table).all():
                raise UserError(f"{self.directory / VECTORS}: a vector of {name!r} is not finite", _AGAIN)
        return found

    @cached_property
    def encoders(self) -> dict[str, Tensor]:
        """Weights of the ID models, as `NAME/weight`."""
        return _read(self.directory / ENCODERS)

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Every source of vectors, by name."""
        found = {}
        for name, facts in self.facts["sources"].items():
            own = {key.removeprefix(f"{name}/"): t for key, t in self.encoders.items() if key.startswith(f"{name}/")}
            users = users_of(facts["users"], _recipe(facts["users"]), own, str(self.directory))
            found[name] = Source(name, self.vectors[IDS + name], users, facts["hash"], {})
        return found

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
    def tables_there(self) -> list[str]:
        """Names of the neighbour tables."""
        files = (Path(file) for file in self.manifest["files"])
        return sorted(file.stem for file in files if file.parent.name == TABLES)

    def neighbours(self, name: str) -> Any:
        """Return a neighbour table, (N, N) sparse."""
        path = self.directory / TABLES / f"{name}.parquet"
        try:
            return read_table(path, len(self.catalogue.titles))
        except (ValueError, KeyError) as error:  # another table's columns, rows beyond the catalogue
            raise UserError(f"{path} cannot be read: {error}", _AGAIN) from None

    @cached_property
    def variant(self) -> Variant:
        """The definition of the variant."""
        return Variant(**self.facts["model"]["variant"])

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of the model; sections that say nothing about it are not those of the run."""
        model = self.facts["model"]
        run, prepare = {"dir": "none", "seed": model["seed"]}, self.tables().model_dump(mode="json")
        # nothing but these: other sections may name code, which would be imported
        settings = {name: model["settings"][name] for name in MODEL_SECTIONS if name in model["settings"]}
        settings["train"] = {"blocks": settings["train"]["blocks"]}
        tree = {"run": run, "prepare": prepare, **settings}
        return validated(RunConfig, tree, str(self.directory / FACTS), remedy=_AGAIN)

    def tables(self, *, log: str = "none", items: str = "none", columns: Mapping[str, str] = NO_COLUMNS) -> Prepare:
        """Return how a log and a catalogue are read that are like those that the recommender was trained on.

        Args:
            log: path of the log.
            items: path of the catalogue.
            columns: names of columns that differ, by role: `user`, `item`, `time` or `position`; `title`, `text`.
        """
        facts = self.facts["tables"]
        of_log, of_items = ({role: columns[role] for role in roles if role in columns} for roles in (LOG, CATALOGUE))
        order = {"time": None, "position": None} if {"time", "position"} & set(of_log) else {}
        text = {"text": [of_items["text"]]} if "text" in of_items else {}
        rules = {name: facts[name] for name in ("duplicates", "repeats")}
        interactions = {**facts["interactions"], **order, **of_log, "path": log}
        catalogue = {**facts["items"], **of_items, **text, "path": items}
        tree = {"interactions": interactions, "items": catalogue, **rules}
        return validated(Prepare, tree, str(self.directory / FACTS), remedy=_AGAIN)


def _recipe(users: Mapping[str, Any]) -> Recipe | None:
    """Return the settings of an ID model of the user's own; None for the others, which need none."""
    settings = dict(users["inner"] if users["kind"] == "mapped" else users)
    kind = settings.pop("kind")
    return Ids(model=kind, settings=settings).recipe if kind not in KINDS_OF_USERS else None


def named_parts(directory: Path) -> list[str]:
    """Return the names of parts of the user's own that a bundle needs: what `trusted` must name."""
    return _parts_of(read_json(directory / FACTS, _AGAIN))


def _parts_of(facts: Mapping[str, Any]) -> list[str]:
    users = [source["users"] for source in facts["sources"].values()]
    kinds = [(of["inner"] if of["kind"] == "mapped" else of)["kind"] for of in users]
    names = [kind for kind in kinds if kind not in KINDS_OF_USERS]
    settings = facts["model"]["settings"] if facts["model"] else {}
    for kind in NAMES_CODE if settings else ():
        section, field = KINDS[kind].field.split(".")
        if settings[section][field] not in KINDS[kind].built_in:
            names.append(settings[section][field])
    if settings and settings["llm"].get("allow_pickle_weights"):
        names.append(PICKLE)
    return names


def _read(path: Path) -> dict[str, Tensor]:
    try:
        # copies, because a mapped file that is cut short would end the process
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}", _AGAIN) from None
