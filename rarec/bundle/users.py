"""Recommendations for the users of a log, whose histories are cleaned and ordered as those of the training were.

For every user: in bounded memory, on any number of ranks, resumed where it was killed. Users are cut into chunks in the
order of their ids. Each chunk becomes a file in a folder beside the result; in the end these are joined. So the bytes
of the result depend neither on the ranks nor on interruptions.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from rarec.bundle.bundle import ITEMS, NO_COLUMNS, Bundle, Columns, Rows
from rarec.bundle.recommended import Id
from rarec.bundle.recommender import Recommender
from rarec.config.schema import Prepare
from rarec.console.progress import track
from rarec.data.engines import PrepareEngine, compute_value, open_engine
from rarec.data.engines.table_files import find_files, hash_files
from rarec.data.preparation import steps
from rarec.data.preparation.inputs import check_order, read_log, table_location
from rarec.data.tables import read_columns
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ranking.rank import USERS_AT_A_TIME
from rarec.storage.artefacts import read_sealed, write_sealed
from rarec.storage.directories import discard, new_directory
from rarec.storage.files import atomic_write

NOTES, PARTS = "recommend.json", "parts"


@contextmanager
def open_log(
    bundle: Bundle, log: str, columns: Columns = NO_COLUMNS, user: str | None = None
) -> Iterator[tuple[int, Iterator[tuple[Id, Rows]]]]:
    """Open a log: the number of its users, and, in the order of their ids, each with the item rows of the history.

    Items that are not in the catalogue are left out, and users without any other. Memory does not depend on the number.

    Args:
        bundle: whose catalogue has the items.
        log: path of the log.
        columns: names of columns that differ from those of the log of the training: `user`, `item`, `time`, `position`.
        user: open this user alone.

    Raises:
        UserError: the log cannot be read, or does not have that user.
    """
    prepare = bundle.prepare({**columns, "path": log})
    with (
        tempfile.TemporaryDirectory(prefix="rarec-") as scratch,
        open_engine(prepare, Path(scratch, "spill")) as engine,
    ):
        table = engine.keep("histories", _read(engine, prepare, bundle.directory / ITEMS, user))
        yield int(compute_value(engine, table.user_row.nunique())), _users(engine, table)


def _users(engine: PrepareEngine, table: ir.Table) -> Iterator[tuple[Id, Rows]]:
    """Yield the users of a table with the columns `user_row`, `user_id`, `item_row` and `position`."""
    columns = ("user_row", "user_id", "item_row")
    batches = engine.batches(table.order_by("user_row", "position").drop("position"))
    rows = (row for batch in batches for row in zip(*(batch[name].to_pylist() for name in columns), strict=True))
    for (_, user), own in groupby(rows, key=lambda row: row[:2]):
        yield user, np.array([item for *_, item in own], np.int64)


def _read(engine: PrepareEngine, prepare: Prepare, items: Path, user: str | None) -> ir.Table:
    log = _read_log(engine, prepare, user)
    users = engine.keep("user_codes", steps.number_ids(log.user))
    catalogue = engine.read(find_files(str(items), "items"), {"item": "item_id"}, lines=True)
    codes = engine.keep("item_codes", steps.number_ids(catalogue["item"]))
    rows = catalogue.select(id="item", row=catalogue.line - 1).inner_join(codes, "id").select("code", "row")
    coded = engine.keep("log", steps.encode_ids(log, users, codes))
    if prepare.duplicates == "drop":
        coded = steps.drop_duplicates(coded)
    if prepare.repeats != "keep":
        coded = steps.drop_repeats(coded, prepare.repeats)
    sequences = steps.build_sequences(coded, users.mutate(row=users.code), engine.keep("item_rows", rows))
    named = sequences.inner_join(users.select(user_row="code", user_id="id"), "user_row")
    return named.select("user_row", "user_id", "item_row", "position")


def _read_log(engine: PrepareEngine, prepare: Prepare, user: str | None) -> ir.Table:
    """Return the raw log, or the rows of one user."""
    config = prepare.interactions
    location = replace(table_location(config, "log"), section="prepare.interactions")  # as `--columns` is known by
    log = steps.drop_missing_ids(read_log(engine, config, location))
    check_order(engine, config, location, log)
    if user is not None:
        log = engine.keep("of_user", log.filter(log.user.cast("string") == user))
        if not compute_value(engine, log.count()):
            raise UserError(f"user {user!r} is not in {config.path}", f"name one of its column {config.user}")
    return log


def recommend_all(
    recommender: Recommender, log: str, out: Path, k: int, *, columns: Columns = NO_COLUMNS, world: World = SINGLE
) -> int:
    """Write the k best new items of every user as rows `user`, `rank`, `item`, `title`, `score`; return their number.

    What was begun from another log, other columns or another bundle is begun anew.

    Args:
        recommender: over the bundle.
        log: path of the log; every rank reads all of it, and serves its share of the users.
        out: file to write, `.parquet`, `.csv` or `.jsonl`.
        k: number of items.
        columns: see `open_log`.
        world: the ranks that share the work.

    Raises:
        UserError: the file is there already, or its ending is unknown; the log cannot be read.
    """
    if out.suffix not in WRITERS:
        raise UserError(f"{out} ends in none of {', '.join(WRITERS)}", "name a file that does")
    if os.path.lexists(out):
        raise UserError(f"{out} is there already", "move it away, or name another file")
    begun = out.with_name(f".{out.name}.begun")
    made_from = {"log": hash_files(find_files(log, "--log")), "columns": str(sorted(columns.items()))}
    identity = {**made_from, "bundle": recommender.bundle.manifest["hash"], "k": k}
    with open_log(recommender.bundle, log, columns) as (count, users):
        world.run_on_main(lambda: _begin(begun, identity))
        parts = [begun / PARTS / f"{number:06}.parquet" for number in range(-(-count // USERS_AT_A_TIME))]
        for number, part in enumerate(track(parts, "recommending")):
            world.report("recommending")
            chunk = list(islice(users, USERS_AT_A_TIME))
            if number % world.size == world.rank and not part.exists():
                with atomic_write(part) as file:
                    pq.write_table(_table(recommender, chunk, k), file, compression="zstd")
    world.barrier()
    empty = _table(recommender, [], k)
    rows = world.run_on_all(lambda: _join(begun, parts, empty, out) if world.is_main else 0)
    return world.all_reduce_max(rows)


def _begin(begun: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder for the parts, unless one of the same bundle and histories is there."""
    try:
        known = read_sealed(begun / NOTES, "") if begun.exists() else None
    except UserError:
        known = None
    if known != identity:
        with new_directory(begun, [f"{PARTS}/"]) as temporary:
            write_sealed(temporary / NOTES, identity)
            (temporary / PARTS).mkdir()


def _table(recommender: Recommender, users: list[tuple[Id, Rows]], k: int) -> pa.Table:
    """Return the rows of some users; ids have the types of the log's and the catalogue's."""
    lists = recommender.recommend_to([rows for _, rows in users], k)
    rows = [
        {"user": user, "rank": rank, **item._asdict()}
        for (user, _), items in zip(users, lists, strict=True)
        for rank, item in enumerate(items, start=1)
    ]
    user_type = pa.int64() if users and isinstance(users[0][0], int) else pa.string()
    item_type = recommender.bundle.catalogue.ids.type
    types = {"user": user_type, "rank": pa.int32(), "item": item_type, "title": pa.string(), "score": pa.float32()}
    return pa.Table.from_pylist(rows, pa.schema(types))


def _join(begun: Path, parts: list[Path], empty: pa.Table, out: Path) -> int:
    """Join the parts to one file, and tidy up; return the number of rows."""
    schema = pq.read_schema(parts[0]) if parts else empty.schema
    with atomic_write(out) as file:
        WRITERS[out.suffix](file, schema, map(read_columns, parts) if parts else [empty])
    rows: int = sum(pq.read_metadata(part).num_rows for part in parts)
    discard(begun)
    return rows


def _write_arrow(
    open_writer: Callable[..., Any], file: IO[bytes], schema: pa.Schema, tables: Iterable[pa.Table]
) -> None:
    with open_writer(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _write_json(file: IO[bytes], schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    for table in tables:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in table.to_pylist())


WRITERS: Mapping[str, Callable[[IO[bytes], pa.Schema, Iterable[pa.Table]], None]] = {
    ".parquet": partial(_write_arrow, partial(pq.ParquetWriter, compression="zstd")),
    ".csv": partial(_write_arrow, csv.CSVWriter),
    ".jsonl": _write_json,
}
"""Writers of tables by the ending of the file."""
