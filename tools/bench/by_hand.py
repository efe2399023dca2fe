"""Prepare one log with hand-written DuckDB SQL: the baseline of `python -m tools.bench.data prepare`.

    python -m tools.bench.by_hand LOG OUT [--memory 6GB]

LOG is a directory from `make_log.py`; OUT gets users.parquet, items.parquet and interactions.parquet, equal to those of
`rarec prepare` for the same log with a 5-core, the first of repeated items, and the brand as further text. Prints the
counts.
"""

import argparse
import json
from pathlib import Path

import duckdb

FEWEST = 5
START = """
SET memory_limit = '{memory}'; SET temp_directory = '{out}/spill'; SET preserve_insertion_order = false;
CREATE TEMP VIEW raw AS SELECT "user", item, time FROM read_parquet('{log}/interactions/*.parquet');
CREATE TEMP VIEW given AS FROM raw WHERE "user" IS NOT NULL AND item IS NOT NULL;
"""
CODES = """
CREATE TEMP TABLE users AS
    SELECT id, (row_number() OVER (ORDER BY id) - 1)::INT AS code, ('0x' || substr(md5(id), 1, 7))::INT AS hash
    FROM (SELECT DISTINCT "user" AS id FROM given);
CREATE TEMP TABLE items AS
    SELECT item AS id, (row_number() OVER (ORDER BY item) - 1)::INT AS code,
        ('0x' || substr(md5(item::VARCHAR), 1, 7))::INT AS hash,
        coalesce(nullif(trim(regexp_replace(title, '\\s+', ' ', 'g')), ''), 'untitled item') AS title,
        coalesce(trim(regexp_replace(brand, '\\s+', ' ', 'g')), '') AS text
    FROM read_parquet('{log}/items.parquet') WHERE item IS NOT NULL;
CREATE TEMP TABLE log AS
    SELECT users.code AS "user", items.code AS item, time::DOUBLE AS time,
        ((users.hash + 1)::BIGINT * (items.hash + 1) % 2147483647)::INT AS tie
    FROM given JOIN users ON given."user" = users.id JOIN items ON given.item = items.id;
"""
DISTINCT = 'CREATE TEMP TABLE kept AS SELECT DISTINCT "user", item, tie, time FROM log'
FIRST = 'CREATE TEMP TABLE kept AS SELECT "user", item, tie, min(time) AS time FROM log GROUP BY "user", item, tie'
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
        (row_number() OVER (PARTITION BY "user" ORDER BY time, tie, item) - 1)::INT AS position
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


def prepare_by_hand(log: Path, out: Path, memory: str) -> list[dict[str, int]]:
    """Write the three tables; return the initial counts and those after each step that dropped rows."""
    out.mkdir(parents=True)
    counts: list[dict[str, int]] = []
    with duckdb.connect() as connection:

        def count(relation: str) -> None:
            columns = 'count(*) AS interactions, count(DISTINCT "user") AS users, count(DISTINCT item) AS items'
            counts.extend(connection.sql(f"SELECT {columns} FROM {relation}").to_arrow_table().to_pylist())

        def enough(column: str) -> bool:
            dropped = connection.execute(ENOUGH.format(column, FEWEST)).fetchall()[0][0]
            if dropped:
                count("log")
            return bool(dropped)

        connection.execute(START.format(memory=memory, out=out, log=log))
        count("raw")
        count("given")
        connection.execute(CODES.format(log=log))
        count("log")
        for step in (DISTINCT, FIRST):
            connection.execute(f"{step}; DROP TABLE log; ALTER TABLE kept RENAME TO log")
            count("log")
        while any([enough("item"), enough("user")]):
            pass
        connection.execute(RESULT.format(out=out))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--memory", default="6GB")
    arguments = parser.parse_args()
    print(json.dumps(prepare_by_hand(arguments.log, arguments.out, arguments.memory), indent=1))
