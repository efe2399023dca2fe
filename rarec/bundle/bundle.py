"""A bundle: one folder that is a whole recommender, but for the frozen language model. No pickle.

| file | what is in it |
| --- | --- |
| `manifest.json` | sha256 of every file; settings, inputs, figures of this row and of its rivals |
| `recommender.json` | the row that is served, weights of its parts, prompt, language model: what it takes to score |
| `items.parquet` | id, title, text and number of training interactions of every item, and columns that rules may name |
| `vectors.safetensors` | item vectors: of the variant (`model`), of every ID model (`ids/NAME`), of texts (`texts`) |
| `encoders.safetensors` | weights of the ID models that read histories |
| `alignment.safetensors`, `lora/` | the trained weights of the variant |
| `neighbours/NAME.parquet` | neighbour tables |
| `order.safetensors` | the learned order of a row `+learned` |

Shape letters: N catalogue, Z size of a scored vector, E source dimension.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from scipy.sparse import csr_matrix
from torch import Tensor

from rarec.bundle.conditions import DATED, KINDS
from rarec.bundle.facts import SCHEMA, BundleFacts, Facts, own_parts, recipe_of
from rarec.bundle.recommended import Catalogue
from rarec.config import MODEL_SECTIONS, RunConfig, Variant
from rarec.config.load import validated
from rarec.config.neighbours import built_in
from rarec.config.schema import Prepare
from rarec.errors import UserError
from rarec.evaluation.results import LEARNED
from rarec.ids.source import BIAS, INNER, MAPPED_ITEMS, MATRIX, Source, users_of
from rarec.models.build import ALIGNMENT, LORA_WEIGHTS, SourceShape
from rarec.neighbours.base import read_table
from rarec.neighbours.scores import NEW
from rarec.ranking.order import LearnedOrder
from rarec.storage.artefacts import MANIFEST, check_files, read_manifest
from rarec.storage.files import open_file

ITEMS, VECTORS, ENCODERS = "items.parquet", "vectors.safetensors", "encoders.safetensors"
ORDER = "order.safetensors"
TABLES, LLM = "neighbours", "llm"
"""Folders: of the neighbour tables, and of the language model, if the bundle was exported with it."""
MODEL, IDS, TEXTS = "model", "ids/", "texts"
"""Names in `vectors.safetensors`: vectors of the variant, of ID models, and the language model's of plain texts."""
FACTS = "recommender.json"
REMEDY = "export it again: rarec export CONFIG --fresh"
Columns = Mapping[str, str]
LARGEST = 1e15
"""Number in a vector: products of larger ones might overflow."""
NO_COLUMNS: Columns = MappingProxyType({})
NOWHERE: Columns = MappingProxyType({"path": "none"})
Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened: all but the language model is in memory, and was checked.

    It is a closed list: a file that the manifest does not name is never read.

    Attributes:
        directory: where it is.
        manifest: its manifest.
        trusted: names of parts of the user's own, `package.module:Name`, that it may import; None trusts all, as the
            run that made it does.
    """

    directory: Path
    manifest: Mapping[str, Any]
    trusted: Collection[str] | None = ()

    @classmethod
    def open(cls, directory: Path, trusted: Collection[str] | None = ()) -> "Bundle":
        """Open a bundle, the only way to read one: hashes, facts, and every array are checked.

        Args:
            directory: where it is.
            trusted: see above.

        Raises:
            UserError: it is missing or damaged, of another version, or needs a part that is not trusted.
        """
        bundle = cls(directory, read_manifest(directory, "bundle"), trusted)
        files = bundle.manifest["files"]
        own = {FACTS, ITEMS, VECTORS, ENCODERS, ORDER, *bundle.weights, *map(_table_file, bundle.tables)}
        check_files(directory, bundle.manifest, REMEDY, names=sorted(set(files) - own))
        inside = (path for path in (bundle.llm.rglob("*") if bundle.llm else ()) if not path.is_dir())
        unlisted = next((path for path in inside if path.relative_to(directory).as_posix() not in files), None)
        if unlisted:  # the language model's library would read it
            raise UserError(f"{unlisted} is not in {directory / MANIFEST}", "move it away")
        bundle._check_vectors()
        # each is read and checked now, and kept
        _ = bundle.sources, bundle.near, bundle.order, bundle.prepare(), bundle.facts["model"] and bundle.config
        return bundle

    @property
    def llm(self) -> Path | None:
        """The folder of the language model, if the bundle was exported with it."""
        inside = any(name.startswith(f"{LLM}/") for name in self.manifest["files"])
        return self.directory / LLM if inside else None

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            UserError: the manifest does not name it, or it is missing or altered.
        """
        path = self.directory / name
        if name not in self.manifest["files"]:
            raise UserError(f"{path} is not in {self.directory / MANIFEST}", REMEDY)
        with self._reading(name), open_file(path) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][name]:
            raise UserError(f"{path} was altered", REMEDY)
        return data

    def copy(self, names: Iterable[str], to: Path) -> None:
        """Copy files, which must be as they were when the bundle was opened.

        Raises:
            UserError: one is gone, or was altered since.
        """
        names = list(names)
        for name in names:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(self.directory / name, to / name)
            except FileNotFoundError:
                raise UserError(f"{self.directory / name} was removed meanwhile", REMEDY) from None
        check_files(to, self.manifest, REMEDY, names=names)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Name the file and the remedy where it cannot be read, or does not hold what it should."""
        try:
            yield
        except (OSError, KeyError, ValueError, RuntimeError, pa.ArrowException, SafetensorError) as error:
            raise UserError(f"{self.directory / name} cannot be read: {error}", REMEDY) from None

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file, all of them finite."""
        data = self.read(name)
        with self._reading(name):
            tensors = load(data)  # not mapped: a mapped file that is cut short would end the process
            for tensor_name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise ValueError(f"tensor {tensor_name!r} is not finite")
        return tensors

    @cached_property
    def facts(self) -> Facts:
        """Contents of `recommender.json`."""
        where = self.directory / FACTS
        data = self.read(FACTS)
        with self._reading(FACTS):
            facts: dict[str, Any] = json.loads(data)
            schema = facts.get("schema") if isinstance(facts, dict) else None
            if schema != SCHEMA:
                problem = f"{where} has the `schema` {schema!r}, this version of rarec reads {SCHEMA}"
                raise UserError(problem, f"update rarec, or {REMEDY}")
            validated(BundleFacts, facts, str(where), remedy=REMEDY)
            json.dumps(facts, allow_nan=False)  # NaN where the schema takes anything: no new version could be written
            named = own_parts(facts)
        for name in named:
            if self.trusted is not None and name not in self.trusted:
                problem = f"{where} names {name}, which is used only if it is trusted"
                remedy = f"if you trust it: --trust {name}, or rarec.load(..., trusted=[{name!r}])"
                raise UserError(problem, remedy)
        return facts

    def _check_vectors(self) -> None:
        """Refuse vectors that are missing, too large, of another size or type, or of nothing in the bundle."""
        count = len(self.catalogue.titles)
        facts = self.facts
        dims: dict[str, int | None] = {IDS + name: source["dim"] for name, source in facts["sources"].items()}
        dims |= {MODEL: None} if facts["model"] else {}
        dims |= {TEXTS: None} if TEXTS in self.vectors and self.reads_llm else {}
        for name in sorted({*dims, *self.vectors}):
            table = self.vectors.get(name, np.empty(0))
            fits = name in dims and table.ndim == 2 and table.size and len(table) == count
            if not fits or table.shape[1] != (dims[name] or table.shape[1]) or np.abs(table).max() > LARGEST:
                wanted = f"vectors of type float32 ({count}, {dims.get(name) or 'any'}), of numbers up to {LARGEST:g}"
                raise UserError(f"{self.directory / VECTORS}: table {name!r} does not hold {wanted}", REMEDY)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items that are ranked."""
        data = self.read(ITEMS)
        with self._reading(ITEMS):
            return Catalogue.read(data)

    @cached_property
    def vectors(self) -> dict[str, Float32]:
        """Item vectors by name: `model`, `ids/NAME`, `texts`."""
        # numpy has no bfloat16: a table of another type is refused with the shapes
        return {name: t.numpy() for name, t in self._tensors(VECTORS).items() if t.dtype == torch.float32}

    @cached_property
    def encoders(self) -> dict[str, Tensor]:
        """Weights of the ID models, as `NAME/weight`."""
        return self._tensors(ENCODERS)

    @cached_property
    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Trained weights of the variant by the names of their files; see `save_weights`."""
        model = self.facts["model"]
        names = [ALIGNMENT, *([LORA_WEIGHTS] if model["variant"]["lora"] else [])] if model else []
        return {name: self._tensors(name) for name in names}

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Every source of vectors, by name."""
        sources = {}
        for name, facts in self.facts["sources"].items():
            own = {key.removeprefix(f"{name}/"): t for key, t in self.encoders.items() if key.startswith(f"{name}/")}
            with self._reading(ENCODERS):
                _check_tables(facts["users"], own, len(self.catalogue.titles), facts["dim"])
                users = users_of(facts["users"], recipe_of(facts["users"]), own, str(self.directory / FACTS))
            if users.per_user != facts["vectors_per_user"]:
                problem = f"`sources.{name}.vectors_per_user` is {facts['vectors_per_user']}, not {users.per_user}"
                raise UserError(f"{self.directory / FACTS}: {problem}", REMEDY)
            sources[name] = Source(name, self.vectors[IDS + name], users, facts["hash"], {})
        return sources

    @property
    def date(self) -> str | None:
        """The column of the items' dates, if there is one."""
        name = self.facts["tables"]["items"].get("date")
        column = self.catalogue.columns.get(name)
        return name if column is not None and KINDS[column.type] in DATED else None

    @property
    def shapes(self) -> dict[str, SourceShape]:
        """Shapes of the sources that slots take."""
        slots = {name: facts for name, facts in self.facts["sources"].items() if "." not in name}
        return {name: SourceShape(facts["dim"], facts["vectors_per_user"]) for name, facts in slots.items()}

    @cached_property
    def tables(self) -> list[str]:
        """Names of the neighbour tables: of the parts that are nothing else."""
        facts = self.facts
        others = {"popularity", "id", NEW, facts["model"] and facts["model"]["variant"]["name"]}
        names = sorted(set(facts["parts"]) - others)
        needs = {name: _table_file(name) for name in names}
        absent = {name: file for name, file in needs.items() if file not in self.manifest["files"]}
        if not facts["neighbours"]:
            absent |= dict.fromkeys(names, "`neighbours`")
        if "id" in facts["parts"] and facts["id_model"] not in facts["sources"]:
            absent["id"] = f"the ID model {facts['id_model']!r}"
        for name, what in absent.items():
            problem = f"{self.directory / FACTS}: part {name!r} needs {what}, which is not in this bundle"
            raise UserError(problem, REMEDY)
        return names

    @cached_property
    def near(self) -> dict[str, csr_matrix]:
        """The neighbour tables by name, (N, N) each."""
        tables = {}
        for name in self.tables:
            data = self.read(_table_file(name))
            with self._reading(_table_file(name)):  # it may have another table's columns, or rows beyond the catalogue
                tables[name] = read_table(pa.BufferReader(data), len(self.catalogue.titles))
        return tables

    @cached_property
    def order(self) -> LearnedOrder | None:
        """The learned order of the row, if it has one."""
        if not self.facts["row"].endswith(LEARNED):
            return None
        tensors = self._tensors(ORDER)
        with self._reading(ORDER):
            first_FH, bias_H, last_H = (tensors[name].float().numpy() for name in ("first_FH", "bias_H", "last_H"))
            order = LearnedOrder(first_FH, bias_H, last_H, float(tensors["factor"]))
            order.check(len(self.facts["parts"]))
        return order

    @property
    def reads_llm(self) -> bool:
        """Return whether a neighbour table is made from vectors of texts, and the row has the language model."""
        models = map(built_in, self.tables)
        return bool(self.facts["model"]) and any(model.reads_llm for model in models if model)

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
        settings["llm"] = {**settings["llm"], "compile": False}  # who opens a bundle has not chosen to run a compiler
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


def _check_tables(users: Mapping[str, Any], tensors: Mapping[str, Tensor], count: int, dim: int) -> None:
    """Refuse tables by which user vectors are made that are of another shape or type than the items' vectors."""
    shapes: dict[str, tuple[int, ...]] = {}
    if users["kind"] == "mapped":
        other = users["inner"].get("dim") or tensors[MATRIX].shape[0]
        shapes = {MAPPED_ITEMS: (count, other), MATRIX: (other, dim), BIAS: (dim,)}
        inner = {name.removeprefix(INNER): tensor for name, tensor in tensors.items() if name.startswith(INNER)}
        _check_tables(users["inner"], inner, count, other)
    for name, shape in shapes.items():
        if tensors[name].shape != shape or tensors[name].dtype != torch.float32:
            raise ValueError(f"tensor {name!r} is not of type float32 and shape {shape}")


def _table_file(name: str) -> str:
    return f"{TABLES}/{name}.parquet"
