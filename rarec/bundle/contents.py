"""What goes into a bundle, and its files; see `bundle` for what each holds.

Shape letters: N catalogue, Z size of a scored vector.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from rarec.bundle.bundle import ENCODERS, FACTS, IDS, ITEMS, MODEL, SCHEMA, TABLES, VECTORS, Catalogue
from rarec.config import MODEL_SECTIONS, RunConfig, Variant
from rarec.ids.source import Source
from rarec.models.towers import RaRec
from rarec.models.weights import save_weights
from rarec.neighbours.table import TABLE
from rarec.storage.files import write_json

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Trained:
    """A trained variant, with its vectors of the catalogue.

    Attributes:
        model: its towers.
        variant: its definition.
        items_NZ: item vectors.
        llm: identity of the language model.
    """

    model: RaRec
    variant: Variant
    items_NZ: Float32
    llm: Mapping[str, str]


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle.

    Attributes:
        row: the row of the results that is served, such as `per_layer+id`.
        parts: name, weight and slope of each of its parts, in the order of the fusion (see `FusedRanker`).
        id_model: name of the source that is the part `id`.
        catalogue: the items.
        trained: the variant, if it is a part.
        sources: vectors that the variant's slots take, and the ID model, if it is a part.
        tables: folders of the neighbour tables that are parts.
    """

    row: str
    parts: Mapping[str, Mapping[str, float]]
    id_model: str
    catalogue: Catalogue
    trained: Trained | None
    sources: Mapping[str, Source]
    tables: Mapping[str, Path]


def write_bundle(directory: Path, contents: Contents, config: RunConfig) -> None:
    """Write a bundle's files, but for its card and manifest.

    Args:
        directory: to write to.
        contents: what goes into it.
        config: the configuration of the run.
    """
    trained = contents.trained
    contents.catalogue.write(directory / ITEMS)
    vectors = {IDS + name: torch.from_numpy(np.ascontiguousarray(s.items_NE)) for name, s in contents.sources.items()}
    if trained is not None:
        vectors[MODEL] = torch.from_numpy(trained.items_NZ)
        save_weights(trained.model, directory, dtype=getattr(torch, config.export.dtype))
    save_file(vectors, directory / VECTORS)
    encoders = {f"{name}/{key}": t for name, s in contents.sources.items() for key, t in s.users.tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in encoders.items()}, directory / ENCODERS)
    for name, folder in contents.tables.items():
        (directory / TABLES).mkdir(exist_ok=True)
        shutil.copyfile(folder / TABLE, directory / TABLES / f"{name}.parquet")
    write_json(directory / FACTS, _facts(contents, config))


def _facts(contents: Contents, config: RunConfig) -> dict[str, Any]:
    trained = contents.trained
    neighbours = {name: getattr(config.neighbours, name) for name in ("newest", "decay", "top")}
    return {
        "schema": SCHEMA,
        "row": contents.row,
        "parts": {name: {key: part[key] for key in ("weight", "slope")} for name, part in contents.parts.items()},
        "id_model": contents.id_model,
        "sources": {name: _source_facts(source) for name, source in contents.sources.items()},
        "neighbours": neighbours if contents.tables else None,
        "batch_size": config.evaluate.batch_size,
        "tables": _table_facts(config),
        "model": _model_facts(trained, config) if trained is not None else None,
    }


def _table_facts(config: RunConfig) -> dict[str, Any]:
    """Return the columns of the log and the catalogue, and which rows are dropped, to read others like them."""
    prepare = config.prepare
    columns = {
        name: table.model_dump(mode="json", exclude={"path", "table"})
        for name, table in (("interactions", prepare.interactions), ("items", prepare.items))
    }
    return {**columns, "duplicates": prepare.duplicates, "repeats": prepare.repeats}


def _source_facts(source: Source) -> dict[str, Any]:
    shape = {"dim": source.dim, "vectors_per_user": source.vectors_per_user}
    return {"users": source.manifest["settings"]["users"], **shape, "hash": source.hash}


def _model_facts(trained: Trained, config: RunConfig) -> dict[str, Any]:
    settings = config.sections(*MODEL_SECTIONS)
    settings["train"] = {"blocks": config.train.blocks}
    return {"variant": vars(trained.variant), "llm": dict(trained.llm), "seed": config.run.seed, "settings": settings}
