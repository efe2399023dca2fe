"""New and removed items without training: a new version of a bundle beside the old one, which stays as it is.

Shape letters: N catalogue, A added items, E source dimension, F size of the fused vectors, K vectors of a user.
"""

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from rarec.bundle.bundle import IDS, MODEL, NO_COLUMNS, TEXTS, Bundle, Columns, Float32
from rarec.bundle.conditions import DATED, KINDS
from rarec.bundle.parts import Parts
from rarec.bundle.recommended import Catalogue
from rarec.bundle.write import write_version
from rarec.config.schema import Prepare
from rarec.data.engines import open_engine
from rarec.data.engines.table_files import DELIMITED, TableLocation
from rarec.data.preparation.inputs import CANONICAL_INTEGER, ISO, as_text, read_catalogue, table_location
from rarec.errors import UserError
from rarec.ids.imports import read_vectors
from rarec.ids.source import MAPPED_ITEMS
from rarec.neighbours.base import pairs_of, plain_texts


def add_items(
    parts: Parts,
    table: str,
    directory: Path | None,
    say: Callable[[str], None],
    *,
    columns: Columns = NO_COLUMNS,
    vectors: Mapping[str, str] = NO_COLUMNS,
) -> tuple[Path, int]:
    """Write a version of a bundle with the items of a table; return its folder and their number.

    Only the new items' prompts are encoded. They are scored with the weights of new items. No score of another item
    changes.

    Args:
        parts: of the bundle.
        table: path of the items.
        directory: to write to; by default the next version beside the bundle.
        say: print one line to the user.
        columns: names of columns that differ from those of the catalogue: `item`, `title`, `text`. The table has the
            columns that rules may name as well.
        vectors: Parquet files of the items' vectors by ID models, by the model's name; zeros where an item has none.

    Raises:
        UserError: the table cannot be read; an id is there twice, or in the catalogue, or of another type; vectors are
            of another shape, or not finite.
    """
    bundle = parts.bundle
    new = _read_items(bundle, table, columns, say)
    count = len(new.titles)
    given = _vectors_of(bundle, new, vectors)
    added = {IDS + name: table_AE for name, table_AE in given.items()}
    if MODEL in bundle.vectors:
        added[MODEL] = parts.model.encode_new(new.titles, new.texts, given)
    if (texts := parts.model.text_vectors) is not None:
        words = plain_texts(new.titles, new.texts, parts.row.untitled)
        added[TEXTS] = texts.encode(list(words))
    all_vectors = {name: np.concatenate([table_NE, added[name]]) for name, table_NE in bundle.vectors.items()}
    encoders = {
        name: torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])]) if _is_table(name) else tensor
        for name, tensor in bundle.encoders.items()
    }
    pairs = {name: [pairs_of(bundle.near[name])] for name in bundle.tables}
    for name, new_items in parts.row.new_items(bundle.catalogue, texts).items():
        pairs[name] += new_items.added(new.titles, new.texts)
    catalogue = Catalogue.of(pa.concat_tables([bundle.catalogue.table, new.table]))
    return write_version(bundle, directory, {"added": count}, all_vectors, encoders, catalogue, pairs), count


def remove_items(bundle: Bundle, items: Collection[str | int], directory: Path | None = None) -> tuple[Path, int]:
    """Write a version of a bundle with fewer items; return its folder and the number of those that are gone.

    Raises:
        UserError: an item is not in the catalogue, or none would be left.
    """
    removed = set(map(str, items))
    names = list(map(str, bundle.catalogue.ids.to_pylist()))
    unknown = sorted(removed - set(names))
    if unknown:
        raise UserError(f"item {unknown[0]!r} is not in {bundle.directory}", "leave it out")
    kept = np.array([row for row, name in enumerate(names) if name not in removed], np.int64)
    if not len(kept):
        raise UserError(f"no item of {bundle.directory} would be left", "keep at least one item")
    catalogue = Catalogue.of(bundle.catalogue.table.take(kept))
    vectors = {name: table_NE[kept] for name, table_NE in bundle.vectors.items()}
    encoders = {name: tensor[kept] if _is_table(name) else tensor for name, tensor in bundle.encoders.items()}
    pairs = {name: [pairs_of(bundle.near[name][kept][:, kept])] for name in bundle.tables}
    what = {"removed": len(removed)}
    return write_version(bundle, directory, what, vectors, encoders, catalogue, pairs), len(removed)


def update_items(
    bundle: Bundle,
    table: str,
    names: Sequence[str],
    directory: Path | None,
    say: Callable[[str], None],
    *,
    columns: Columns = NO_COLUMNS,
    date: str | None = None,
) -> tuple[Path, int]:
    """Write a version of a bundle whose items have the columns of a table; return its folder and their number.

    An item that the table lacks keeps what it has. A column that the bundle has keeps its type.

    Args:
        bundle: the old version.
        table: path of the columns, beside ids of items.
        names: of the columns.
        directory: to write to; by default the next version beside the bundle.
        say: print one line to the user.
        columns: name of the column of ids, if it differs from the catalogue's: `item`.
        date: the column, one of these or of the bundle's, that says how new an item is.

    Raises:
        UserError: the table cannot be read, lacks a column, has no item of the catalogue or values of another type.
    """
    known = bundle.catalogue
    prepare = bundle.prepare(items={**columns, "columns": [*names], "date": date, "path": table})
    location = replace(table_location(prepare.items, "items"), section="prepare.items")
    types = {name: column.type for name, column in known.columns.items() if column.null_count < len(column)}
    read, row_N, unknown = read_columns(prepare, location, prepare.items.kept, known.ids, types)
    count = len(row_N) - row_N.null_count
    if not count:
        raise UserError(f"{location.name}: no item is in {bundle.directory}", "check that both use the same ids")
    if unknown:
        say(f"{len(unknown):,} items of {location.name} are not in the catalogue: left out")
    for name in types.keys() & read.keys():
        read[name] = pc.if_else(pc.is_valid(row_N), read[name], known.columns[name])
    items = {**bundle.facts["tables"]["items"], "columns": list({**known.columns, **read})}
    items["date"] = date_of(read, date, location) or items.get("date")
    facts = {**bundle.facts, "tables": {**bundle.facts["tables"], "items": items}}
    catalogue = replace(known, columns={**known.columns, **read})
    changed = {"updated": prepare.items.kept}
    return write_version(bundle, directory, changed, bundle.vectors, bundle.encoders, catalogue, facts=facts), count


def _read_items(bundle: Bundle, table: str, columns: Columns, say: Callable[[str], None]) -> Catalogue:
    """Read items that may become part of a catalogue, in the order of the table; they have no interactions."""
    text = {"text": [columns["text"]]} if "text" in columns else {}
    prepare = bundle.prepare(items={**columns, **text, "path": table})
    location = replace(table_location(prepare.items, "items"), section="prepare.items")  # as `--columns` is known by
    with (
        tempfile.TemporaryDirectory(prefix="rarec-") as scratch,
        open_engine(prepare, Path(scratch, "spill")) as engine,
    ):
        items, counts = read_catalogue(engine, prepare.items, location, say)
        if counts["repeated_ids"]:
            problem = f"{location.name}: {counts['repeated_ids']} rows repeat an item id"
            raise UserError(problem, "keep one row of each id")
        batches = list(engine.batches(items.order_by("line").select("item", "title", "text")))
    rows = pa.Table.from_batches(batches)
    ids = _checked_ids(bundle, rows["item"].combine_chunks())
    known = bundle.catalogue.columns
    types = {name: column.type for name, column in known.items()}
    kept = read_columns(prepare, location, list(known), ids, types)[0] if known else {}
    counts_N = np.zeros(len(ids), np.int64)
    return Catalogue(ids, rows["title"].to_pylist(), rows["text"].to_pylist(), counts_N, kept)


def _checked_ids(bundle: Bundle, ids: pa.Array) -> pa.Array:
    """Return new ids in the type of the catalogue's."""
    known = bundle.catalogue.ids
    if pa.types.is_integer(known.type) and not pa.types.is_integer(ids.type):
        remedy = "give the new items ids of the same kind"
        raise UserError(f"item ids of {bundle.directory} are integers, and {ids[0].as_py()!r} is none", remedy)
    cast: pa.Array = ids.cast(known.type)
    repeated = sorted(set(known.to_pylist()) & set(cast.to_pylist()), key=str)
    if repeated:
        problem = f"item {repeated[0]!r} is in {bundle.directory} already ({len(repeated)} such items)"
        raise UserError(problem, "leave it out, or remove it first: rarec items remove")
    return cast


def _vectors_of(bundle: Bundle, new: Catalogue, files: Mapping[str, str]) -> dict[str, Float32]:
    """Return the new items' vectors of every ID model, (A, E); zeros for those that do not know them."""
    count = len(new.titles)
    sources = bundle.facts["sources"]
    vectors = {name: np.zeros((count, facts["dim"]), np.float32) for name, facts in sources.items()}
    for name, path in files.items():
        if name not in vectors:
            raise UserError(f"--vectors: there is no ID model {name!r}", f"choose from {', '.join(vectors)}")
        with tempfile.TemporaryDirectory(prefix="rarec-") as scratch:
            file = Path(scratch, "vectors.npy")
            rows = read_vectors(path, None, "--vectors", "--vectors")
            rows.write_aligned(file, new.ids, "item", "leave those items out", gaps=True)
            given = np.load(file, allow_pickle=False)
        shape = vectors[name].shape
        if given.shape != shape:
            problem = f"--vectors: those of {name} are of shape {given.shape}, the items need {shape}"
            raise UserError(problem, "give one vector for each row of the table, zeros where there is none")
        vectors[name] = given
    return vectors


def _is_table(name: str) -> bool:
    """Return whether a tensor of an ID model has a row for each item."""
    return name.rpartition("/")[2].rpartition(".")[2] == MAPPED_ITEMS


# ---- columns that rules may name, each of one of five types


def read_columns(
    prepare: Prepare, location: TableLocation, names: Sequence[str], ids: pa.Array, types: Mapping[str, pa.DataType]
) -> tuple[dict[str, pa.Array], pa.Array, list[str]]:
    """Read columns of a table for the items of a catalogue.

    Args:
        prepare: says how tables are read, and which column has the ids.
        location: of the table.
        names: of the columns.
        ids: of the catalogue, (N,).
        types: that columns must have, by name; of all others they are found.

    Returns:
        The columns by name, (N,), null where the table says nothing; the row of each item in the table, null where it
        has none, (N,); and the ids of the table that are not in the catalogue.

    Raises:
        UserError: the table cannot be read, lacks a column, or has values of another type.
    """
    roles = {f"columns_{place}": name for place, name in enumerate(names)}
    with (
        tempfile.TemporaryDirectory(prefix="rarec-") as scratch,
        open_engine(prepare, Path(scratch, "spill")) as engine,
    ):
        read = engine.read(location, {"item": str(prepare.items.item), **roles}, lines=True)
        rows = read.mutate(item=as_text(read["item"])).order_by("line").drop("line")
        table = pa.Table.from_batches(list(engine.batches(rows)), rows.schema().to_pyarrow())
    given, known = table["item"].cast(pa.string()), ids.cast(pa.string())
    row_N = pc.index_in(known, value_set=given)
    columns = {}
    for role, name in roles.items():
        try:
            whole = _typed(table[role].combine_chunks(), location.format in DELIMITED, types.get(name))
        except (ValueError, pa.ArrowException) as error:
            problem = f"{location.name}: column {name!r} does not hold {KINDS[types[name]]} in every row: {error}"
            raise UserError(problem, "correct it, or give the column another name") from None
        columns[name] = whole.take(row_N)
    unknown = given.filter(pc.invert(pc.fill_null(pc.is_in(given, value_set=known), True)))
    return columns, row_N, unknown.to_pylist()


def columns_of(prepare: Prepare, ids: pa.Array) -> dict[str, pa.Array]:
    """Return the columns that a configuration keeps for the rules of a bundle, (N,) each, by name.

    Raises:
        UserError: see `read_columns`; or the column of dates holds text or truths.
    """
    names, date = prepare.items.kept, prepare.items.date
    if not names:
        return {}
    location = table_location(prepare.items, "prepare.items")
    columns, *_ = read_columns(prepare, location, names, ids, {})
    date_of(columns, date, location)
    return columns


def date_of(columns: Mapping[str, pa.Array], date: str | None, location: TableLocation) -> str | None:
    """Return the name of the column of dates, if there is one.

    Raises:
        UserError: it holds text or truths.
    """
    if date is not None and (kind := KINDS[columns[date].type]) not in DATED:
        problem = f"{location.name}: column {date!r} ({location.field('date')}) holds {kind}"
        raise UserError(problem, "name a column of ISO 8601 times, or of numbers")
    return date


def _typed(column: pa.Array, is_text: bool, wanted: pa.DataType | None) -> pa.Array:
    """Return a column in one of the five types; a file of text has its values as text."""
    if is_text:
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
        return _parsed(column, wanted) if wanted else _found(column)
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    elif pa.types.is_integer(kind):
        column = column.cast(pa.int64())
    elif pa.types.is_temporal(kind):
        column = column.cast(pa.timestamp("us"))
    elif not pa.types.is_boolean(kind):
        column = column.cast(pa.string())
    return column.cast(wanted or column.type)


def _found(column: pa.Array) -> pa.Array:
    """Return text in the first type that takes all of it."""
    if column.null_count < len(column):
        for kind in _PATTERNS:
            with suppress(ValueError, pa.ArrowException):
                return _parsed(column, kind)
    return column


def _parsed(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return text in a type; times with an offset are converted to UTC."""
    wrong = column.filter(pc.invert(pc.match_substring_regex(column, _PATTERNS[kind])))
    if len(wrong):
        raise ValueError(repr(wrong[0].as_py()))
    if pa.types.is_boolean(kind):
        return pc.equal(pc.utf8_lower(column), "true")
    if pa.types.is_timestamp(kind) and pc.any(pc.match_substring_regex(column, r":[0-9.]+(Z|[+-][0-9:]+)$")).as_py():
        column = column.cast(pa.timestamp("us", "UTC"))
    return column.cast(kind)


_PATTERNS = {
    pa.bool_(): "(?i)^(true|false)$",
    pa.int64(): CANONICAL_INTEGER,
    pa.float64(): "^-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]+)?$",  # `007` is the text of a code
    pa.timestamp("us"): ISO,
    pa.string(): "",
}
"""What values of each type look like in a file of text, in the order in which types are tried."""
