"""Write a bundle: what goes into it, its files, its card for model hubs, and new versions of it beside the old one.

See `bundle` for what each file holds. Shape letters: N catalogue, Z size of a scored vector.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import Tensor

from rarec.bundle.bundle import ENCODERS, FACTS, IDS, ITEMS, MODEL, ORDER, TABLES, TEXTS, VECTORS, Bundle, Float32
from rarec.bundle.facts import SCHEMA
from rarec.bundle.recommended import Catalogue
from rarec.config import MODEL_SECTIONS, RunConfig, Variant
from rarec.data.tables import write_rows
from rarec.errors import UserError
from rarec.evaluation.results import (
    FULL,
    figure,
    headline_metrics,
    interval,
    listed,
    part_title,
    variant_order,
    variant_title,
)
from rarec.ids.source import Source
from rarec.models.build import save_weights
from rarec.models.towers import RaRec
from rarec.neighbours.base import SCHEMA as ROWS
from rarec.neighbours.base import TABLE
from rarec.neighbours.scores import NEW
from rarec.storage.artefacts import write_manifest
from rarec.storage.directories import new_directory
from rarec.storage.files import open_to_lock, write_json, write_text

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md")
FIGURES = ("row", "why", "metrics", "trained_parameters")
"""Fields of the manifest for the reader, which a new version keeps."""


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
        parts: name, weight and new weight of each of its parts, in the order of the fusion (see `FusedRanker`).
        catalogue: the items.
        trained: the variant, if it is a part.
        sources: vectors that the variant's slots take, and the ID model, if it is a part.
        tables: folders of the neighbour tables that are parts.
        texts_ND: the language model's vectors of plain texts, if a table is made from them and the variant is a part.
        order: weights of the learned order, by the fields of `LearnedOrder`, if the row has one.
    """

    row: str
    parts: Mapping[str, Mapping[str, float]]
    catalogue: Catalogue
    trained: Trained | None
    sources: Mapping[str, Source]
    tables: Mapping[str, Path]
    texts_ND: Float32 | None = None
    order: Mapping[str, Any] | None = None


def write_bundle(directory: Path, contents: Contents, config: RunConfig) -> None:
    """Write a bundle's files, but for its card and manifest.

    Args:
        directory: to write to.
        contents: what goes into it.
        config: the configuration of the run.
    """
    trained = contents.trained
    contents.catalogue.write(directory / ITEMS)
    vectors = {IDS + name: source.items_NE for name, source in contents.sources.items()}
    if trained is not None:
        vectors[MODEL] = trained.items_NZ
        vectors |= {TEXTS: contents.texts_ND} if contents.texts_ND is not None else {}
        save_weights(trained.model, directory, dtype=getattr(torch, config.export.dtype))
    save_tensors(vectors, directory / VECTORS)
    save_tensors(encoders_of(contents.sources), directory / ENCODERS)
    if contents.order is not None:
        save_tensors(contents.order, directory / ORDER)
    for name, folder in contents.tables.items():
        (directory / TABLES).mkdir(exist_ok=True)
        shutil.copyfile(folder / TABLE, directory / TABLES / f"{name}.parquet")
    write_json(directory / FACTS, _facts(contents, config))


def encoders_of(sources: Mapping[str, Source]) -> dict[str, Tensor]:
    """Return the weights of the sources' ID models, as `NAME/weight`."""
    return {f"{name}/{key}": t for name, source in sources.items() for key, t in source.users.tensors.items()}


def save_tensors(tensors: Mapping[str, Tensor | Float32], path: Path) -> None:
    """Write tensors as safetensors."""
    save_file({name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}, path)


def _facts(contents: Contents, config: RunConfig) -> dict[str, Any]:
    trained = contents.trained
    section = config.neighbours
    neighbours: dict[str, Any] = {name: getattr(section, name) for name in ("newest", "decay", "top")}
    places = {"path", "table"}
    tables = config.prepare.model_dump(
        mode="json",
        include={"interactions", "items", "duplicates", "repeats"},
        exclude={"interactions": places, "items": places},
    )
    return {
        "schema": SCHEMA,
        "row": contents.row,
        "parts": {name: {key: part[key] for key in ("weight", "new_weight")} for name, part in contents.parts.items()},
        "id_model": "id",
        "sources": {name: _source_facts(source) for name, source in contents.sources.items()},
        "neighbours": neighbours if contents.tables else None,
        "asked": config.evaluate.model_dump(include={"exclude_seen", "max_history"}),
        "batch_size": config.evaluate.batch_size,
        "tables": tables,
        "model": _model_facts(trained, config) if trained is not None else None,
    }


def _source_facts(source: Source) -> dict[str, Any]:
    shape = {"dim": source.dim, "vectors_per_user": source.vectors_per_user}
    return {"users": source.manifest["settings"]["users"], **shape, "hash": source.hash}


def _model_facts(trained: Trained, config: RunConfig) -> dict[str, Any]:
    settings = config.sections(*MODEL_SECTIONS)
    settings["train"] = {"blocks": config.train.blocks}
    return {"variant": vars(trained.variant), "llm": dict(trained.llm), "seed": config.run.seed, "settings": settings}


def next_version(bundle: Path) -> Path:
    """Return the first free name of a version: `bundle-2` beside `bundle`, then `bundle-3`."""
    bundle = bundle if bundle.name not in ("", "..") else bundle.resolve()  # `.` has no name
    stem, _, last = bundle.name.rpartition("-")
    name, number = (stem, int(last)) if stem and last.isascii() and last.isdigit() else (bundle.name, 1)
    while os.path.lexists(path := bundle.with_name(f"{name}-{number + 1}")):
        number += 1
    return path


def write_version(
    bundle: Bundle,
    directory: Path | None,
    what: Mapping[str, Any],
    vectors: Mapping[str, Float32],
    encoders: Mapping[str, Tensor],
    catalogue: Catalogue | None = None,
    pairs: Mapping[str, Iterable[pa.RecordBatch]] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a new version of a bundle, which holds all files of the old one but those that change; return its folder.

    Its manifest has the old one's figures, and `versions`: what each version changed.

    Args:
        bundle: the old version.
        directory: of the new one; see `next_version` for the default.
        what: says what the version changes.
        vectors: see `Bundle.vectors`.
        encoders: see `Bundle.encoders`.
        catalogue: the items, if they change.
        pairs: rows of the neighbour tables that change, by name.
        facts: contents of `recommender.json`, if they change.

    Raises:
        UserError: the folder is there already; a file of the old version was removed or altered since it was opened.
    """
    changed: dict[str, Callable[[Path], object]] = {
        VECTORS: partial(save_tensors, vectors),
        ENCODERS: partial(save_tensors, encoders),
        **{f"{TABLES}/{name}.parquet": partial(write_rows, rows, schema=ROWS) for name, rows in (pairs or {}).items()},
        **({ITEMS: catalogue.write} if catalogue else {}),
        **({FACTS: partial(write_json, value=facts)} if facts else {}),
    }
    manifest = bundle.manifest
    kept = [name for name in manifest["files"] if name not in changed]
    if not bundle.directory.is_dir():
        raise UserError(f"{bundle.directory} was removed meanwhile", "restore it, or export it again")
    with open_to_lock(bundle.directory) as handle, ExitStack() as stack:
        fcntl.flock(handle, fcntl.LOCK_EX)  # two writers would choose the same name
        directory = directory or next_version(bundle.directory)
        temporary = stack.enter_context(new_directory(directory, replace=False))
        bundle.copy(kept, temporary)
        for name in sorted(set(manifest["files"]) & set(changed)):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            changed[name](temporary / name)
        made_from = {**manifest["made_from"], "bundle": manifest["hash"]}
        known = manifest.get("versions")
        versions = [*(known if isinstance(known, list) else []), {**what, "of": manifest["hash"]}]
        figures = {name: manifest[name] for name in FIGURES if name in manifest}
        settings = manifest["settings"]
        write_manifest(temporary, "bundle", settings=settings, made_from=made_from, **figures, versions=versions)
    return directory


def write_card(
    directory: Path, contents: Contents, config: RunConfig, figures: Mapping[str, Any], verdict: str
) -> None:
    """Write the card: Markdown with the front matter that model hubs read.

    Args:
        directory: of the bundle.
        contents: of the bundle.
        config: of the run.
        figures: `metrics` (rows of metrics.json) and `trained_parameters`, as in the manifest.
        verdict: whether the run's main variant adds to the untrained baselines, in one sentence.
    """
    catalogue, trained = contents.catalogue, contents.trained
    card = ModelCard.from_template(
        _card_data(contents, config, figures),
        str(TEMPLATE),
        title=variant_title(contents.row),
        verdict=verdict,
        parts=[part_title(name) for name in contents.parts if name != NEW],
        parameters=figures["trained_parameters"],
        # as Python literals: an id may hold a quote, or end the block of code
        examples=[ascii(item).replace("`", r"\x60") for item in catalogue.ids[:2].to_pylist()],
        llm=trained and trained.llm,
        lora=trained and trained.variant.lora,
        slots=trained and describe_slots(trained.variant, config),
        config=config,
        items=len(catalogue.titles),
        n=max(row["n"] for row in figures["metrics"]),
        table=_table(contents.row, figures["metrics"]),
    )
    write_text(directory / CARD, f"{card}\n")


def hub_name(model: str) -> str | None:
    """Return the name of a language model of the hub; None for one that is on this machine: hubs refuse paths."""
    return model if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model) and not Path(model).exists() else None


def _card_data(contents: Contents, config: RunConfig, figures: Mapping[str, Any]) -> ModelCardData:
    """Return what model hubs read: licence, language model, and the row's figures."""
    dataset = f"test users of a log, {len(contents.catalogue.titles):,} items"
    results = [
        EvalResult("sequential-recommendation", "log", dataset, metric_type=row["metric"], metric_value=row["value"])
        for row in figures["metrics"]
        if row["protocol"] == FULL and row["variant"] == contents.row
    ]
    return ModelCardData(
        base_model=hub_name(contents.trained.llm["name"]) if contents.trained else None,
        library_name="rarec",
        license=config.export.license,
        tags=["recommendation", "ra-rec"],
        model_name=variant_title(contents.row),
        eval_results=results,
    )


def describe_slots(variant: Variant, config: RunConfig) -> str:
    """Describe the slots of a variant, and the blocks that they enter."""
    if variant.blocks == "none":
        return "no slots"
    every = "every block" if config.train.blocks is None else f"the blocks {', '.join(map(str, config.train.blocks))}"
    where = {"all": f"at the input of {every}", "input": "at the input of block 0", "readout": "at the readout alone"}
    parts = [f"{config.alignment.instructions} contextual instructions"] if variant.instructions else []
    parts += [f"vectors of {', '.join(config.sources_by_name)}"] if variant.projections else []
    parts += ["vectors of the history's items"] if variant.projections and "{soft:" in config.prompt.title else []
    return f"{listed(parts)} {where[variant.blocks]}"


def _table(row: str, metrics: list[Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of the lines of a table of the variants' headline figures."""
    full = {(values["variant"], values["metric"]): values for values in metrics if values["protocol"] == FULL}
    names = headline_metrics(metric for _, metric in full)
    lines = [["row", *map(str.upper, names)], ["---"] * (len(names) + 1)]
    for variant in sorted({variant for variant, _ in full}, key=variant_order):
        mark = "**" if variant == row else ""
        cells = [full.get((variant, name)) for name in names]
        values = [f"{figure(c['value'])} ({interval(c['low'], c['high'])})" if c else "" for c in cells]
        lines.append([f"{mark}{variant_title(variant)}{mark}", *values])
    return lines
