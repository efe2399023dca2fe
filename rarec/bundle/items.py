"""New and removed items without training: a new version of a bundle beside the old one, which stays as it is.

Shape letters: N catalogue, A added items, E source dimension.
"""

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from rarec.bundle.bundle import ENCODERS, IDS, ITEMS, MODEL, TABLES, VECTORS, Bundle, Catalogue
from rarec.bundle.parts import Parts
from rarec.bundle.versions import new_version
from rarec.config.logs import Prepare
from rarec.data import tables
from rarec.data.engines import open_engine
from rarec.data.preparation.inputs import read_catalogue, table_location
from rarec.errors import UserError
from rarec.ids.mapped import ITEMS as MAPPED
from rarec.ids.source import LEFT
from rarec.neighbours.lexical import Words, plain_texts
from rarec.neighbours.table import SCHEMA, pairs_of

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
LEXICAL = "lexical"
_CHANGED = (ITEMS, VECTORS, ENCODERS, f"{TABLES}/")


@dataclass(frozen=True)
class NewItems:
    """Items to add.

    Attributes:
        catalogue: their ids, titles and texts; they have no training interactions.
        vectors: of ID models by name, (A, E), for those that know them; zeros where an item has none.
    """

    catalogue: Catalogue
    vectors: Mapping[str, Float32]


def read_items(prepare: Prepare, say: Callable[[str], None]) -> Catalogue:
    """Read items that may become part of a catalogue, in the order of the table.

    Args:
        prepare: where they are, and their columns; see `Bundle.tables`.
        say: print one line to the user.

    Raises:
        UserError: the table cannot be read, or has an id twice.
    """
    location = table_location(prepare.items, "items")
    with (
        tempfile.TemporaryDirectory(prefix="rarec-") as scratch,
        open_engine(prepare, Path(scratch, "spill")) as engine,
    ):
        found = read_catalogue(engine, prepare.items, location, say)
        if found.counts["repeated_ids"]:
            problem = f"{found.name}: {found.counts['repeated_ids']} rows repeat an item id"
            raise UserError(problem, "keep one row of each id")
        batches = list(engine.batches(found.table.order_by("line").select("item", "title", "text")))
    table = pa.Table.from_batches(batches)
    titles, texts = (table[name].to_pylist() for name in ("title", "text"))
    return Catalogue(table["item"].combine_chunks(), titles, texts, np.zeros(len(titles), np.int64))


def add_items(parts: Parts, new: NewItems, directory: Path) -> None:
    """Write a version of a bundle with more items.

    Only the new items' prompts are encoded. What the ID models and the neighbour tables do not know of them is
    predicted from their words, as of any item without a vector. No score of another item changes.

    Args:
        parts: of the bundle.
        new: the items.
        directory: to write to.

    Raises:
        UserError: an id is in the catalogue, or of another type; vectors are of another shape, or not finite.
    """
    bundle, count = parts.bundle, len(new.catalogue.titles)
    ids = _checked_ids(bundle, new.catalogue.ids)
    given = _checked_vectors(bundle, new.vectors, count)
    vectors = dict(bundle.vectors)
    for name in bundle.facts["sources"]:
        vectors[IDS + name] = np.concatenate([vectors[IDS + name], given[name]])
    if MODEL in vectors:
        encoded = parts.encode_new(new.catalogue.titles, new.catalogue.texts, given)
        vectors[MODEL] = np.concatenate([vectors[MODEL], encoded])
    old, added = bundle.catalogue, new.catalogue
    catalogue = Catalogue(
        pa.concat_arrays([old.ids, ids]),
        old.titles + added.titles,
        old.texts + added.texts,
        np.concatenate([old.counts_N, added.counts_N]),
    )
    found = {name: [pairs_of(bundle.neighbours(name))] for name in bundle.tables_there}
    if LEXICAL in found:
        found[LEXICAL] += _lexical_pairs(bundle, added)
    tensors = {
        name: torch.cat([t, t.new_zeros(count, *t.shape[1:])]) if _is_table(name) else t
        for name, t in bundle.encoders.items()
    }
    _write(bundle, directory, _Changed(catalogue, vectors, tensors, found), {"added": count})


def remove_items(bundle: Bundle, items: Collection[str | int], directory: Path) -> None:
    """Write a version of a bundle with fewer items.

    Raises:
        UserError: an item is not in the catalogue, or none would be left.
    """
    wanted, old = set(map(str, items)), bundle.catalogue
    names = list(map(str, old.ids.to_pylist()))
    unknown = sorted(wanted - set(names))
    if unknown:
        raise UserError(f"item {unknown[0]!r} is not in {bundle.directory}", "leave it out")
    kept = np.array([row for row, name in enumerate(names) if name not in wanted], np.int64)
    if not len(kept):
        raise UserError(f"no item of {bundle.directory} would be left", "keep at least one item")
    titles, texts = ([of[row] for row in kept] for of in (old.titles, old.texts))
    catalogue = Catalogue(old.ids.take(pa.array(kept)), titles, texts, old.counts_N[kept])
    vectors = {name: table[kept] for name, table in bundle.vectors.items()}
    found = {name: [pairs_of(bundle.neighbours(name)[kept][:, kept])] for name in bundle.tables_there}
    tensors = {name: t[torch.from_numpy(kept)] if _is_table(name) else t for name, t in bundle.encoders.items()}
    _write(bundle, directory, _Changed(catalogue, vectors, tensors, found), {"removed": len(names) - len(kept)})


@dataclass(frozen=True)
class _Changed:
    """The files of a version that differ from those of the one before."""

    catalogue: Catalogue
    vectors: Mapping[str, Float32]
    encoders: Mapping[str, Tensor]
    neighbours: Mapping[str, list[pa.RecordBatch]]


def _write(bundle: Bundle, directory: Path, changed: _Changed, what: Mapping[str, int]) -> None:
    with new_version(bundle, directory, _CHANGED, what) as temporary:
        changed.catalogue.write(temporary / ITEMS)
        save_file(
            {name: torch.from_numpy(table.copy()) for name, table in changed.vectors.items()}, temporary / VECTORS
        )
        save_file({name: tensor.contiguous() for name, tensor in changed.encoders.items()}, temporary / ENCODERS)
        for name, batches in changed.neighbours.items():
            (temporary / TABLES).mkdir(exist_ok=True)
            tables.write_rows(batches, temporary / TABLES / f"{name}.parquet", SCHEMA)


def _checked_ids(bundle: Bundle, ids: pa.Array) -> pa.Array:
    """Return new ids in the type of the catalogue's."""
    known = bundle.catalogue.ids
    if pa.types.is_integer(known.type) and not pa.types.is_integer(ids.type):
        remedy = "give the new items ids of the same kind"
        raise UserError(f"item ids of {bundle.directory} are integers, and {ids[0].as_py()!r} is none", remedy)
    cast: pa.Array = ids.cast(known.type)
    there = sorted(set(known.to_pylist()) & set(cast.to_pylist()), key=str)
    if there:
        problem = f"item {there[0]!r} is in {bundle.directory} already ({len(there)} such items)"
        raise UserError(problem, "leave it out, or remove it first: rarec items remove")
    return cast


def _checked_vectors(bundle: Bundle, given: Mapping[str, Float32], count: int) -> dict[str, Float32]:
    """Return the new items' vectors of every ID model; zeros for those that do not know them."""
    found = {name: np.zeros((count, facts["dim"]), np.float32) for name, facts in bundle.facts["sources"].items()}
    for name, vectors in given.items():
        if name not in found:
            raise UserError(f"--vectors: there is no ID model {name!r}", f"choose from {', '.join(found)}")
        wanted = found[name].shape
        if vectors.shape != wanted or not np.isfinite(vectors).all():
            problem = f"--vectors: those of {name} are of shape {vectors.shape}, the items need {wanted}"
            raise UserError(
                problem if vectors.shape != wanted else f"--vectors: those of {name} are not finite",
                "give one finite vector for each row of the table, zeros where there is none",
            )
        found[name] = vectors.astype(np.float32)
    return found


def _is_table(name: str) -> bool:
    """Return whether a tensor of an ID model has a row for each item."""
    return name.rpartition("/")[2].rpartition(".")[2] in (LEFT, MAPPED)


def _lexical_pairs(bundle: Bundle, added: Catalogue) -> list[pa.RecordBatch]:
    new = list(plain_texts(added.titles, added.texts, bundle.facts["tables"]["items"]["untitled"]))
    return list(words_of(bundle).added(new))


def words_of(bundle: Bundle) -> Words:
    """Return the words of a bundle's catalogue, with which new items are compared."""
    facts, old = bundle.facts, bundle.catalogue
    texts = plain_texts(old.titles, old.texts, facts["tables"]["items"]["untitled"])
    return Words(texts, bundle.neighbours(LEXICAL), int(facts["neighbours"]["top"]))
