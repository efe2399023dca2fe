"""Recommendations for every user of a log: in bounded memory, on any number of ranks, resumed where it was killed.

Users are cut into chunks in the order of their ids. Each chunk becomes a file in a folder beside the result; in the end
these are joined. So the bytes of the result depend neither on the ranks nor on interruptions.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from rarec.bundle.histories import Histories, UserHistory
from rarec.bundle.recommender import Recommender
from rarec.console.progress import track
from rarec.data.tables import read_columns
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ranking.rankers import USERS_AT_A_TIME
from rarec.storage.artefacts import read_sealed, write_sealed
from rarec.storage.directories import discard, new_directory
from rarec.storage.files import atomic_write

NOTES, PARTS = "recommend.json", "parts"


def recommend_all(
    recommender: Recommender,
    histories: Histories,
    out: Path,
    k: int,
    made_from: Mapping[str, str],
    world: World = SINGLE,
) -> int:
    """Write the k best new items of every user as rows `user`, `rank`, `item`, `title`, `score`; return their number.

    Args:
        recommender: over the bundle.
        histories: of the users; every rank reads all of them, and serves its share.
        out: file to write, `.parquet`, `.csv` or `.jsonl`.
        k: number of items.
        made_from: hashes of what the histories come from; what was begun from others is begun anew.
        world: the ranks that share the work.

    Raises:
        UserError: the file is there already, or its ending is unknown.
    """
    if out.suffix not in _JOIN:
        raise UserError(f"{out} ends in none of {', '.join(_JOIN)}", "name a file that does")
    if os.path.lexists(out):
        raise UserError(f"{out} is there already", "move it away, or name another file")
    place = out.with_name(f".{out.name}.begun")
    identity = {**made_from, "bundle": recommender.bundle.manifest["hash"], "k": k}
    world.run_on_main(lambda: _begin(place, identity))
    chunks = range(-(-len(histories) // USERS_AT_A_TIME))
    world.report("recommending")
    for count, users in zip(track(chunks, "recommending"), _chunks(histories), strict=True):
        part = place / PARTS / f"{count:06}.parquet"
        world.report("recommending")
        if count % world.size == world.rank and not part.exists():
            with atomic_write(part) as file:
                pq.write_table(_table(recommender, users, k), file, compression="zstd")
    world.barrier()
    rows = list[int]()
    world.run_on_main(lambda: rows.append(_join(recommender, place, len(chunks), out)))
    return world.all_reduce_max(sum(rows))


def _begin(place: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder for the parts, unless one of the same bundle and histories is there."""
    try:
        found = read_sealed(place / NOTES, "") if place.exists() else None
    except UserError:
        found = None
    if found != identity:
        with new_directory(place, [f"{PARTS}/"]) as temporary:
            write_sealed(temporary / NOTES, identity)
            (temporary / PARTS).mkdir()


def _chunks(histories: Iterable[UserHistory]) -> Iterator[list[UserHistory]]:
    left = iter(histories)
    while users := list(islice(left, USERS_AT_A_TIME)):
        yield users


def _table(recommender: Recommender, users: list[UserHistory], k: int) -> pa.Table:
    lists = recommender.recommend_to([user.rows for user in users], k)
    rows = [
        (user.user, rank, *one)
        for user, items in zip(users, lists, strict=True)
        for rank, one in enumerate(items, start=1)
    ]
    schema = _schema(recommender, users)
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)


def _schema(recommender: Recommender, users: list[UserHistory]) -> pa.Schema:
    """Return the columns; ids have the types of the log's."""
    user = pa.int64() if users and isinstance(users[0].user, int) else pa.string()
    item = recommender.bundle.catalogue.ids.type
    types = {"user": user, "rank": pa.int32(), "item": item, "title": pa.string(), "score": pa.float32()}
    return pa.schema(list(types.items()))


def _join(recommender: Recommender, place: Path, count: int, out: Path) -> int:
    """Join the parts to one file, and tidy up; return the number of rows."""
    parts = [place / PARTS / f"{number:06}.parquet" for number in range(count)]
    with atomic_write(out) as file:
        tables = map(read_columns, parts) if parts else iter([_schema(recommender, []).empty_table()])
        rows = _JOIN[out.suffix](tables, file)
    discard(place)
    return rows


def _parquet(tables: Iterator[pa.Table], file: IO[bytes]) -> int:
    return _written(tables, lambda schema: pq.ParquetWriter(file, schema, compression="zstd"))


def _csv(tables: Iterator[pa.Table], file: IO[bytes]) -> int:
    return _written(tables, lambda schema: csv.CSVWriter(file, schema))


def _written(tables: Iterator[pa.Table], opened: Callable[[pa.Schema], Any]) -> int:
    rows, writer = 0, None
    for table in tables:
        writer = writer or opened(table.schema)
        writer.write_table(table)
        rows += table.num_rows
    if writer is not None:
        writer.close()
    return rows


def _jsonl(tables: Iterator[pa.Table], file: IO[bytes]) -> int:
    rows = 0
    for rows, row in enumerate((row for table in tables for row in table.to_pylist()), start=1):  # noqa: B007
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return rows


_JOIN = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}
