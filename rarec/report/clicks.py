"""Join clicks with the impressions of a service: the click rate of each bundle and of each place in its lists.

A click belongs to the list with its answer's id that holds its item; without ids, to the newest list with its item that
its user saw before it, within a day. A list counts as clicked once, whatever is clicked in it. Rates have Wilson
intervals of 95% over as many independent lists as those of one user are worth (the design effect).

Shape letters: C clusters, which are users, or answers where no user is known.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rarec.data.engines.duckdb_engine import DuckDBEngine
from rarec.data.engines.table_files import find_files
from rarec.data.preparation.inputs import as_seconds, as_text
from rarec.errors import UserError
from rarec.ranking.metrics import Interval
from rarec.storage.files import KEY, hash_user, read_key

ROLES = ("id", "item", "user", "time")
"""Of the columns of clicks: `item`, and `id` or both others."""
WITHIN = 24 * 3600
"""Seconds after a list in which a click without an id is one on it."""
Z = 1.959964
"""Of a 95% interval."""
Counts = npt.NDArray[np.int64]
_SHOWN = """
CREATE TABLE lists AS SELECT row_number() OVER () AS list, * FROM {rows};
CREATE TABLE shown AS
    SELECT list, id, "user", epoch("time") AS "time", unnest(items) AS item, generate_subscripts(items, 1) AS rank
    FROM lists;
"""
_CLICKED = """
CREATE TABLE clicked AS
    SELECT DISTINCT list, rank FROM (
        SELECT list, rank, row_number() OVER (PARTITION BY click ORDER BY shown."time" DESC, list DESC, rank) AS newest
        FROM clicks JOIN shown ON shown.item = clicks.item AND {same}
    ) WHERE newest = 1;
"""
_COLUMNS = """{'time': 'TIMESTAMPTZ', 'id': 'VARCHAR', 'bundle': 'VARCHAR', 'version': 'VARCHAR', 'user': 'VARCHAR',
    'items': 'VARCHAR[]'}"""
_REMEDY = (
    "give the clicks on these lists: with `id` (of the answer, or its header x-request-id) and `item`, or with `user`"
    " (of the request), `item` and `time`; name other columns: --columns id=...,item=..."
)
_SAME_ID = "shown.id = clicks.id"
_SAME_USER = f"""shown."user" = clicks."user" AND clicks."time" - shown."time" BETWEEN 0 AND {WITHIN}"""
_BUNDLES = """
SELECT bundle, version, coalesce("user", id) AS cluster, count(*) AS shown,
       count(*) FILTER (list IN (SELECT list FROM clicked)) AS clicked
FROM lists GROUP BY ALL ORDER BY ALL
"""
_RANKS = """
SELECT bundle, version, rank, count(*) AS shown, count(clicked.list) AS clicked
FROM lists JOIN shown USING (list) LEFT JOIN clicked USING (list, rank) GROUP BY ALL ORDER BY ALL
"""


@dataclass(frozen=True)
class BundleClicks:
    """How often the lists of a bundle were clicked.

    Attributes:
        bundle: its name in the settings, and its version.
        lists: number of lists that were shown.
        rate: share of them with a click.
        by_rank: share of the items with a click, by their place in the list, from 1.
    """

    bundle: str
    lists: int
    rate: Interval
    by_rank: dict[int, float]


def count_clicks(impressions: Path, clicks: str, columns: Mapping[str, str]) -> list[BundleClicks]:
    """Return the click rates of the bundles in a folder of impressions.

    Args:
        impressions: folder that `impressions.path` of a service names.
        clicks: table of clicks: a file, folder, glob or URL.
        columns: names of its columns, by role, where they are not the roles themselves.

    Raises:
        UserError: one of them cannot be read or lacks a column, or no click is on any of the lists.
    """
    with duckdb.connect() as database:
        database.execute(_SHOWN.format(rows=_rows(impressions)))
        given, same = _read(clicks, columns)
        if same == _SAME_USER:
            given = given.set_column(given.column_names.index("user"), "user", _hashed(impressions, given["user"]))
        database.register("clicks", given.append_column("click", pa.array(range(len(given)))))
        database.execute(_CLICKED.format(same=same))
        if not database.execute("SELECT count(*) FROM clicked").fetchall()[0][0]:
            problem = f"{clicks}: none of {len(given):,} clicks is on a list in {impressions}"
            raise UserError(problem, _REMEDY)
        return list(_bundles(database))


def click_rate(clicked_C: Counts, shown_C: Counts) -> Interval:
    """Return the share of lists with a click, with a 95% Wilson interval over the effective number of lists."""
    lists, clusters = int(shown_C.sum()), len(shown_C)
    rate = float(clicked_C.sum() / lists)
    residuals_C = clicked_C - rate * shown_C
    variance = float((residuals_C**2).sum()) * clusters / max(1, clusters - 1) / lists**2
    number = min(lists, rate * (1 - rate) / variance) if variance else lists
    middle = (rate + Z**2 / (2 * number)) / (1 + Z**2 / number)
    half = Z * sqrt(rate * (1 - rate) / number + (Z / (2 * number)) ** 2) / (1 + Z**2 / number)
    return Interval(rate, min(rate, max(0.0, middle - half)), max(rate, min(1.0, middle + half)))


def difference(one: Interval, other: Interval) -> Interval:
    """Return one rate less another of other users, with Newcombe's interval from those of both."""
    mean = one.mean - other.mean
    low = sqrt((one.mean - one.low) ** 2 + (other.high - other.mean) ** 2)
    high = sqrt((one.high - one.mean) ** 2 + (other.mean - other.low) ** 2)
    return Interval(mean, mean - low, mean + high)


def lines(bundles: list[BundleClicks]) -> Iterator[str]:
    """Yield the lines that the terminal shows; each bundle is compared with the one of the most lists."""
    most = max(bundles, key=lambda bundle: bundle.lists)
    for bundle in bundles:
        rate, less = bundle.rate, difference(bundle.rate, most.rate)
        beside = (
            "" if bundle is most else f"; {less.mean:+.2%} [{less.low:+.2%}, {less.high:+.2%}] beside {most.bundle}"
        )
        yield f"{bundle.bundle}: {rate.mean:.2%} [{rate.low:.2%}, {rate.high:.2%}] of {bundle.lists:,} lists{beside}"
        yield "  by place: " + ", ".join(f"{rank} {share:.2%}" for rank, share in bundle.by_rank.items())


def _bundles(database: duckdb.DuckDBPyConnection) -> Iterator[BundleClicks]:
    clusters, ranks = database.sql(_BUNDLES).to_arrow_table(), database.sql(_RANKS).fetchall()
    names = sorted(set(zip(clusters["bundle"].to_pylist(), clusters["version"].to_pylist(), strict=True)))
    for name, version in names:
        own = clusters.filter((pc.field("bundle") == name) & (pc.field("version") == version))
        clicked_C, shown_C = (own[column].to_numpy().astype(np.int64) for column in ("clicked", "shown"))
        by_rank = {rank: clicked / shown for *of, rank, shown, clicked in ranks if of == [name, version]}
        yield BundleClicks(f"{name} {version}", int(shown_C.sum()), click_rate(clicked_C, shown_C), by_rank)


def _rows(impressions: Path) -> str:
    """Return the SQL relation of all rows in a folder of impressions."""
    files = find_files(str(impressions), "impressions")
    paths = "[" + ", ".join("'" + path.replace("'", "''") + "'" for path in files.paths) + "]"
    return f"read_parquet({paths})" if files.format == "parquet" else f"read_json({paths}, columns={_COLUMNS})"


def _read(clicks: str, columns: Mapping[str, str]) -> tuple[pa.Table, str]:
    """Return clicks, with ids, items and users as text and times as seconds, and the condition that joins them."""
    files = find_files(clicks, "clicks")
    with tempfile.TemporaryDirectory(prefix="rarec-") as scratch, closing(DuckDBEngine(Path(scratch, "x"))) as engine:
        try:
            table = engine.read(files, {role: columns.get(role, role) for role in ("id", "item")})
            same = _SAME_ID
        except UserError:
            if "id" in columns:
                raise
            table = engine.read(files, {role: columns.get(role, role) for role in ("user", "item", "time")})
            same = _SAME_USER
        made = {role: as_seconds(table.time, 1.0) if role == "time" else as_text(table[role]) for role in table.columns}
        return pa.Table.from_batches(engine.batches(table.select(**made))), same


def _hashed(impressions: Path, users: pa.ChunkedArray) -> pa.Array:
    """Return what stands for users in a folder of impressions."""
    try:
        key = read_key(impressions)
    except OSError as error:
        problem = f"{impressions / KEY}: {error.strerror}"
        raise UserError(problem, "bring it from where the impressions were written, or join by id") from None
    return pa.array([user and hash_user(key, user) for user in users.to_pylist()], pa.string())
