"""Recommendations for the users of a log, whose histories are cleaned and ordered as those of the training were.

For every user: in bounded memory, on any number of ranks, resumed where it was killed. Users are cut into chunks in the
order of their ids, each a part of the result (`storage/parts.py`). So the bytes of the result depend neither on the
ranks nor on interruptions.
"""

import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from rarec.bundle.bundle import ITEMS, NO_COLUMNS, Bundle, Columns, Rows
from rarec.bundle.recommended import Id
from rarec.bundle.recommender import Recommender
from rarec.config.schema import Interactions, Prepare
from rarec.console.progress import track
from rarec.data.engines import PrepareEngine, compute_value, open_engine
from rarec.data.engines.table_checks import MissingColumn
from rarec.data.engines.table_files import find_files, hash_files
from rarec.data.preparation import steps
from rarec.data.preparation.inputs import check_order, read_log, table_location, use_same_ids
from rarec.data.tables import read_columns
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ranking.rank import USERS_AT_A_TIME
from rarec.storage.artefacts import sha256_json
from rarec.storage.files import atomic_write
from rarec.storage.parts import Parts, refuse_existing

Say = Callable[[str], None]
USUAL_COLUMNS = {
    "user": {"user", "user_id", "userid", "customer", "customer_id"},
    "item": {"item", "item_id", "itemid", "product", "product_id", "sku"},
    "time": {"time", "timestamp", "datetime", "date", "bought_at", "created_at"},
    "position": {"position", "rank"},
}
"""Usual names of a log's columns, in lower case, by role: one is taken where that of the training is missing."""


@contextmanager
def open_log(
    bundle: Bundle, log: str, say: Say, columns: Columns = NO_COLUMNS, user: str | None = None
) -> Iterator[tuple[int, Iterator[tuple[Id, Rows]]]]:
    """Open a log: the number of its users, and, in the order of their ids, each with the item rows of the history.

    Items that are not in the catalogue are left out, and users without any other; it says how many. Memory does not
    depend on the number.

    Args:
        bundle: whose catalogue has the items.
        log: path of the log.
        say: print one line to the user.
        columns: names of columns that differ from those of the log of the training: `user`, `item`, `time`, `position`.
            One that is missing and not named here is replaced by the only column with a usual name; it says so.
        user: open this user alone.

    Raises:
        UserError: the log cannot be read, does not have that user, or has no item of the catalogue.
    """
    prepare = bundle.prepare({**columns, "path": log})
    with (
        tempfile.TemporaryDirectory(prefix="rarec-") as scratch,
        open_engine(prepare, Path(scratch, "spill")) as engine,
    ):
        items = Path(scratch, ITEMS)
        bundle.catalogue.write(items)  # as it was checked; the file may be another by now
        table = engine.keep("histories", _read(engine, prepare, items, columns, say, user))
        yield int(compute_value(engine, table.user_row.nunique())), _users(engine, table)


def _users(engine: PrepareEngine, table: ir.Table) -> Iterator[tuple[Id, Rows]]:
    """Yield the users of a table with the columns `user_row`, `user_id`, `item_row` and `position`."""
    columns = ("user_row", "user_id", "item_row")
    batches = engine.batches(table.order_by("user_row", "position").drop("position"))
    rows = (row for batch in batches for row in zip(*(batch[name].to_pylist() for name in columns), strict=True))
    for (_, user), own in groupby(rows, key=lambda row: row[:2]):
        yield user, np.array([item for *_, item in own], np.int64)


def _read(
    engine: PrepareEngine, prepare: Prepare, items: Path, columns: Columns, say: Say, user: str | None
) -> ir.Table:
    log = engine.keep("given", _read_log(engine, prepare.interactions, columns, say, user))
    users = engine.keep("user_codes", steps.number_ids(log.user))
    catalogue = engine.read(find_files(str(items), "items"), {"item": "item_id"}, lines=True)
    codes = engine.keep("item_codes", steps.number_ids(catalogue["item"]))
    rows = catalogue.select(id="item", row=catalogue.line - 1).inner_join(codes, "id").select("code", "row")
    coded = engine.keep("log", steps.encode_ids(log, users, codes))
    _say_unknown(engine, prepare.interactions, log, coded, catalogue, say)
    if prepare.drops_duplicates:
        coded = steps.drop_duplicates(coded)
    if prepare.repeats != "keep":
        coded = steps.drop_repeats(coded, prepare.repeats)
    sequences = steps.build_sequences(coded, users.mutate(row=users.code), engine.keep("item_rows", rows))
    named = sequences.inner_join(users.select(user_row="code", user_id="id"), "user_row")
    return named.select("user_row", "user_id", "item_row", "position")


def _say_unknown(
    engine: PrepareEngine, config: Interactions, log: ir.Table, coded: ir.Table, catalogue: ir.Table, say: Say
) -> None:
    """Say how many items and users of a log the catalogue does not know; refuse a log of which it knows nothing."""
    for unit, text in (("item", "not in the catalogue"), ("user", "without an item of the catalogue")):
        given, known = (int(compute_value(engine, table[unit].nunique())) for table in (log, coded))
        if given and not known:
            problem = f"{config.path}: no {unit} is in the catalogue"
            raise UserError(problem, use_same_ids(engine, log, catalogue))
        if given > known:
            say(f"{given - known:,} of {given:,} {unit}s are {text}: left out")


def _read_log(engine: PrepareEngine, config: Interactions, columns: Columns, say: Say, user: str | None) -> ir.Table:
    """Return the raw log, or the rows of one user."""
    location = replace(table_location(config, "log"), section="prepare.interactions")  # as `--columns` is known by
    taken: dict[str, str] = {}
    while True:
        try:
            log = steps.drop_missing_ids(read_log(engine, config, location))
            break
        except MissingColumn as missing:
            taken[missing.role] = _usual_column(missing, {*columns, *taken})
            config = config.model_copy(update=taken)
    if taken:
        say(f"{config.path}: " + ", ".join(f"the {role} is in column {name!r}" for role, name in taken.items()))
    check_order(engine, config, location, log)
    if user is not None:
        log = engine.keep("of_user", log.filter(log.user.cast("string") == user))
        if not compute_value(engine, log.count()):
            raise UserError(f"user {user!r} is not in {config.path}", f"name one of its column {config.user}")
    return log


def _usual_column(missing: MissingColumn, chosen: Collection[str]) -> str:
    """Return the one column with a usual name for a role whose column is missing; raise what is missing otherwise.

    Args:
        missing: says which.
        chosen: roles whose columns were named, or have been chosen.
    """
    usual = [name for name in missing.columns if name.lower() in USUAL_COLUMNS[missing.role]]
    if len(usual) != 1 or missing.role in chosen:
        raise missing
    return usual[0]


def recommend_all(
    recommender: Recommender,
    log: str,
    out: Path,
    k: int,
    *,
    say: Say = lambda line: None,
    columns: Columns = NO_COLUMNS,
    world: World = SINGLE,
    rules: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Write the k best new items of every user as rows `user`, `rank`, `item`, `title`, `score`; return their number.

    What was begun from another log, other columns or another bundle is begun anew.

    Args:
        recommender: over the bundle.
        log: path of the log; every rank reads all of it, and serves its share of the users.
        out: file to write, `.parquet`, `.csv` or `.jsonl`.
        k: number of items.
        say: print one line to the user.
        columns: see `open_log`.
        world: the ranks that share the work.
        rules: fields of `Request`, the same for all users.

    Raises:
        UserError: the file is there already, its ending is unknown, or another process writes it; the log cannot be
            read.
    """
    if out.suffix not in WRITERS:
        raise UserError(f"{out} ends in none of {', '.join(WRITERS)}", "name a file that does")
    refuse_existing(out)
    made_from = {
        "log": hash_files(find_files(log, "--log")),
        "columns": str(sorted(columns.items())),
        "rules": {**rules},
    }
    identity = sha256_json({**made_from, "bundle": recommender.bundle.manifest["hash"], "k": k})
    parts = Parts(out, identity)
    heard = say if world.is_main else lambda line: None
    with open_log(recommender.bundle, log, heard, columns) as (count, users), ExitStack() as locks:
        world.run_on_main(lambda: locks.enter_context(parts.begun()))
        names = [f"{number:06}" for number in range(-(-count // USERS_AT_A_TIME))]
        for number, name in enumerate(track(names, "recommending")):
            world.report("recommending")
            chunk = list(islice(users, USERS_AT_A_TIME))
            if number % world.size == world.rank and parts.find(name) is None:
                table = _table(recommender, chunk, k, rules)
                parts.add(name, partial(pq.write_table, table, compression="zstd"))
        world.barrier()
        empty = _table(recommender, [], k, rules)
        rows = world.run_on_all(lambda: _join(parts, names, empty, out) if world.is_main else 0)
        return world.all_reduce_max(rows)


def _table(recommender: Recommender, users: list[tuple[Id, Rows]], k: int, rules: Mapping[str, Any]) -> pa.Table:
    """Return the rows of some users; ids have the types of the log's and the catalogue's."""
    lists = recommender.recommend_to([rows for _, rows in users], k, **rules)
    rows = [
        {"user": user, "rank": rank, **item._asdict()}
        for (user, _), items in zip(users, lists, strict=True)
        for rank, item in enumerate(items, start=1)
    ]
    user_type = pa.int64() if users and isinstance(users[0][0], int) else pa.string()
    item_type = recommender.bundle.catalogue.ids.type
    types = {"user": user_type, "rank": pa.int32(), "item": item_type, "title": pa.string(), "score": pa.float32()}
    return pa.Table.from_pylist(rows, pa.schema(types))


def _join(parts: Parts, names: list[str], empty: pa.Table, out: Path) -> int:
    """Join the parts to one file, and tidy up; return the number of rows."""
    paths = parts.all(names)
    schema = pq.read_schema(paths[0]) if paths else empty.schema
    with atomic_write(parts.whole) as file:
        WRITERS[out.suffix](file, schema, map(read_columns, paths) if paths else [empty])
    rows: int = sum(pq.read_metadata(path).num_rows for path in paths)
    parts.place()
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
