"""Prepare logs of two sizes with rarec and with hand-written DuckDB SQL; the results must be equal.

Each preparation keeps the 5-core, the first of repeated items, and the brand as further text. A log that is missing is
made. --memory limits DuckDB, and the process uses somewhat more; --most is the goal for the whole process, in GB.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from rarec.config.schema import Prepare
from tools.bench.measuring import GB, Figure, Row, apart, at_most, log_section, memory, prepare_dataset, seconds
from tools.make_log import make_log

OPTIONS = {"directory": Path, "rows": [10_000_000, 100_000_000], "memory": "6GB", "rounds": 1, "most": 8.0}
ROWS_OF_A_USER, ROWS_OF_AN_ITEM, FEWEST = 10, 200, 5
JUNK = {"ties": 0.3, "nulls": 0.001, "unknown": 0.001, "duplicates": 0.01, "shuffled": True}
RAREC, BY_HAND = "rarec", "SQL by hand"
TABLES = ("users", "items", "interactions")
START = """
SET memory_limit = '{memory}'; SET temp_directory = '{out}/spill'; SET preserve_insertion_order = false;
CREATE TEMP VIEW raw AS
    SELECT "user", item, time, (file_index::BIGINT << 40) + file_row_number AS tie
    FROM read_parquet('{log}/interactions/*.parquet');
CREATE TEMP VIEW given AS FROM raw WHERE "user" IS NOT NULL AND item IS NOT NULL;
"""
CODES = """
CREATE TEMP TABLE users AS
    SELECT id, (row_number() OVER (ORDER BY id) - 1)::INT AS code
    FROM (SELECT DISTINCT "user" AS id FROM given);
CREATE TEMP TABLE items AS
    SELECT item AS id, (row_number() OVER (ORDER BY item) - 1)::INT AS code,
        coalesce(nullif(trim(regexp_replace(title, '\\s+', ' ', 'g')), ''), 'untitled item') AS title,
        coalesce(trim(regexp_replace(brand, '\\s+', ' ', 'g')), '') AS text
    FROM read_parquet('{log}/items.parquet') WHERE item IS NOT NULL;
CREATE TEMP TABLE log AS
    SELECT users.code AS "user", items.code AS item, time::DOUBLE AS time, tie
    FROM given JOIN users ON given."user" = users.id JOIN items ON given.item = items.id;
"""
DISTINCT = 'CREATE TEMP TABLE kept AS SELECT "user", item, min(tie) AS tie, time FROM log GROUP BY "user", item, time'
FIRST = """
CREATE TEMP TABLE kept AS
    SELECT "user", item, arg_min(tie, time) AS tie, min(time) AS time FROM log GROUP BY "user", item
"""
ENOUGH = 'DELETE FROM log WHERE "{0}" IN (SELECT "{0}" FROM log GROUP BY "{0}" HAVING count(*) < {1})'
RESULT = """
CREATE TEMP TABLE user_rows AS
    SELECT id, code, (row_number() OVER (ORDER BY code) - 1)::INT AS row
    FROM users SEMI JOIN log ON users.code = log."user";
CREATE TEMP TABLE item_rows AS
    SELECT id, code, title, text, (row_number() OVER (ORDER BY code) - 1)::INT AS row
    FROM items SEMI JOIN log ON items.code = log.item;
CREATE TEMP TABLE sequences AS
    SELECT user_rows.row AS user_row, item_rows.row AS item_row, time,
        (row_number() OVER (PARTITION BY "user" ORDER BY time, tie) - 1)::INT AS position
    FROM log JOIN user_rows ON log."user" = user_rows.code JOIN item_rows ON log.item = item_rows.code;
CREATE TEMP TABLE lengths AS
    SELECT user_row, count(*)::INT AS length, CASE WHEN length >= 3 THEN length - 2 ELSE length END AS train_length
    FROM sequences GROUP BY user_row;
CREATE TEMP TABLE trained AS
    SELECT item_row, count(*) AS train_count FROM sequences JOIN lengths USING (user_row)
    WHERE position < train_length GROUP BY item_row;
COPY (
    SELECT row, id AS user_id, (sum(length) OVER (ORDER BY row) - length)::BIGINT AS start, length, train_length,
        CASE WHEN length >= 3 THEN length - 2 ELSE -1 END AS validation,
        CASE WHEN length >= 3 THEN length - 1 ELSE -1 END AS test, train_length < 2 AS cold
    FROM user_rows JOIN lengths ON row = user_row ORDER BY row
) TO '{out}/users.parquet' (FORMAT parquet, COMPRESSION zstd);
COPY (
    SELECT row, id AS item_id, title, text, coalesce(train_count, 0) AS train_count, train_count IS NULL AS cold
    FROM item_rows LEFT JOIN trained ON row = item_row ORDER BY row
) TO '{out}/items.parquet' (FORMAT parquet, COMPRESSION zstd);
COPY (SELECT user_row, item_row, time FROM sequences ORDER BY user_row, position)
    TO '{out}/interactions.parquet' (FORMAT parquet, COMPRESSION zstd);
"""


@dataclass(frozen=True)
class Cost:
    """Time, memory and result of one preparation."""

    seconds: float
    peak: float
    """Peak resident memory in GB."""
    digests: tuple[Any, ...]
    """Digests of the tables."""


def run(arguments: argparse.Namespace) -> list[Figure]:
    """Prepare each log with both."""
    figures, per_row = [], []
    for rows in arguments.rows:
        costs = costs_of(arguments.directory, rows, arguments.memory, arguments.rounds)
        spent = {name: min(cost.seconds for cost in own) for name, own in costs.items()}
        peak = {name: max(cost.peak for cost in own) for name, own in costs.items()}
        results = [cost.digests for own in costs.values() for cost in own]
        same = results == results[:1] * len(results)
        per_row.append(spent[RAREC] / rows)
        figures += [
            *(Figure(f"{rows:,} rows: {name}", f"{spent[name]:,.1f} s, {peak[name]:.2f} GB") for name in costs),
            Figure(f"{rows:,} rows: same tables", "yes" if same else "no", "yes", same),
            at_most(f"{rows:,} rows: peak resident memory", peak[RAREC], arguments.most, " GB"),
            at_most(f"{rows:,} rows: time, {RAREC} / {BY_HAND}", spent[RAREC] / spent[BY_HAND], 1.5),
        ]
    growth = f"time per row, {arguments.rows[-1]:,} rows / {arguments.rows[0]:,}"
    return [*figures, at_most(growth, per_row[-1] / per_row[0], 1.3)]


def row(directory: Path, interactions: int) -> Row:
    """Prepare a log once with both."""
    costs = costs_of(directory, interactions, "6GB", rounds=1)
    ours, other = (costs[way][0].seconds for way in (RAREC, BY_HAND))
    return Row.most(f"preparation / SQL by hand, {interactions:,} interactions", ours, other, 1.5, "s")


def costs_of(directory: Path, rows: int, limit: str, rounds: int) -> dict[str, list[Cost]]:
    """Measure both in turns, over a log of this size, which is made if it is missing."""
    log, out = directory / f"log-{rows}", directory / "out"
    if not (log / "interactions").is_dir():
        make_log(log, users=rows // ROWS_OF_A_USER, items=rows // ROWS_OF_AN_ITEM, interactions=rows, **JUNK)
    costs: dict[str, list[Cost]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, own in costs.items():
            shutil.rmtree(out, ignore_errors=True)
            own.append(apart(cost_of, name, log, out, limit))
            print(f"{rows:,} rows, {name}: {own[-1].seconds:,.1f} s", file=sys.stderr)
    shutil.rmtree(out)
    return costs


def cost_of(name: str, log: Path, out: Path, limit: str) -> Cost:
    """Prepare in one of the ways, in this process."""
    spent = seconds(lambda: WAYS[name](log, out, limit))
    return Cost(spent, memory("VmHWM") * GB, digests(out / "prepare"))


def prepare_with_rarec(log: Path, out: Path, limit: str) -> None:
    """Prepare with rarec, including the hashing of input and output."""
    fewest = {"min_user_interactions": FEWEST, "min_item_interactions": FEWEST}
    prepare_dataset(Prepare.model_validate(log_section(log, memory=limit, **fewest)), out)


def digests(directory: Path) -> tuple[Any, ...]:
    """Return the number of rows of each table, and a digest of all values and row positions."""
    # hashed twice: the hash of a pair is the exclusive or of two hashes, which two exchanged rows would not change
    select = "SELECT count(*), bit_xor(hash(hash(t, file_row_number))) FROM read_parquet('{}') AS t"
    with duckdb.connect() as connection:
        return tuple(connection.execute(select.format(directory / f"{name}.parquet")).fetchone() for name in TABLES)


def prepare_by_hand(log: Path, out: Path, limit: str) -> None:
    """Write the three tables."""
    tables = out / "prepare"
    tables.mkdir(parents=True)
    with duckdb.connect() as connection:
        connection.execute(START.format(memory=limit, out=tables, log=log))
        connection.execute(CODES.format(log=log))
        for step in (DISTINCT, FIRST):
            connection.execute(f"{step}; DROP TABLE log; ALTER TABLE kept RENAME TO log")
        steps = [ENOUGH.format(column, FEWEST) for column in ("item", "user")]
        while sum(connection.execute(step).fetchall()[0][0] for step in steps):
            pass
        connection.execute(RESULT.format(out=tables))


WAYS: dict[str, Callable[[Path, Path, str], None]] = {RAREC: prepare_with_rarec, BY_HAND: prepare_by_hand}
