"""One preparation, many engines: the same files, byte for byte; and tables by name, and files behind URLs."""

import hashlib
import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, time
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rarec.config import dump_config
from rarec.config.schema import Prepare
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.storage.files import read_json
from tests.datasets import identity_of, prepare_dataset
from tests.engines import needs_spark, on, spark_session
from tests.test_prepare import CATALOGUE, LOG, any_log, configure, refuse, write
from tools.make_log import make_log

POLICIES: list[dict[str, Any]] = [
    {"repeats": "first", "min_item_interactions": 2},
    {"repeats": "last", "split": {"kind": "temporal", "validation_share": 0.2, "test_share": 0.2}},
    {"repeats": "runs", "duplicates": "keep"},
    {"repeats": "keep", "duplicates": "keep", "split": {"new_items": 0.3}},
]


def run(config: Prepare, to: Path, told: list[str] | None = None) -> PreparedDataset:
    return prepare_dataset(config, to, seed=0, say=(told if told is not None else []).append)


@needs_spark
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["repeats"])
def test_duckdb_and_spark_agree_on_every_policy(tmp_path: Path, policy: dict[str, Any]) -> None:
    items = [(number, f"t{number}", "", "") for number in range(8)]
    log = [*any_log(7), *any_log(7)[:9], (None, 3, 2), (1, None, 2), (1, 99, 2)]
    write(tmp_path, log, [*items, (3, "again", "", ""), (None, "none", "", "")])
    config = configure(tmp_path, **policy)
    one, other = (run(on(engine, config), tmp_path / engine) for engine in ("duckdb", "spark"))
    assert one.hash == other.hash
    assert one.manifest["steps"] == other.manifest["steps"]
    assert one.manifest["catalogue"] == other.manifest["catalogue"]


@needs_spark
def test_duckdb_and_spark_agree_on_a_large_log_with_ties_nulls_and_junk(tmp_path: Path) -> None:
    log = tmp_path / "log"
    make_log(log, users=9_000, items=1_000, interactions=100_000, seed=3, ties=0.3, nulls=0.01, duplicates=0.02)
    config = Prepare.model_validate(
        {
            "interactions": {"path": f"{log}/interactions", "user": "user", "item": "item", "time": "time"},
            "items": {"path": f"{log}/items.parquet", "item": "item", "title": "title", "text": ["brand"]},
            "min_item_interactions": 5,
            "split": {"validation_users": 2048},
        }
    )
    one, other = (run(on(engine, config), tmp_path / engine) for engine in ("duckdb", "spark"))
    assert one.manifest["counts"]["interactions"] > 70_000
    dropped = {step["step"]: step["interactions_before"] - step["interactions_after"] for step in one.manifest["steps"]}
    assert dropped["ids"] > 500
    assert dropped["duplicates"] > 500
    assert one.manifest["files"] == other.manifest["files"]
    assert one.manifest["steps"] == other.manifest["steps"]
    assert one.manifest["counts"]["validation_users"] == 2048


TIMES = [
    "2023-11-14", "2023-11-14T22:13", "2023-11-14 22:13:20.123456", "2023-11-14T22:13:20Z", "2023-11-14T22:13:20+05:30",
    "2023-11-14T22:13:20-0330", "2023-11-14T22:13:20 +01", "2024-02-29", "1969-12-31T23:59:59.5Z",
]  # fmt: skip
NUMBERS = {".5": 0.5, "7.": 7, "1.5e3": 1500, "+1700000000": 1_700_000_000, "0": 0}
NO_TIMES = [
    "2023-02-29",
    "2023-1-4",
    "1d",
    "0x10",
    "1_000",
    "Infinity",
    "2023-11-14T25:00",
    "2023-11-14T22:13:20+99",
    "1 ",
]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["duckdb", pytest.param("spark", marks=needs_spark)])
def test_what_a_text_means_as_a_time_is_ours_to_say(tmp_path: Path, engine: str) -> None:
    seconds = [
        1699920000, 1699999980, 1700000000.123456, 1700000000, 1699980200, 1700012600, 1699996400, 1709164800, -0.5,
    ]  # fmt: skip
    for texts in (dict(zip(TIMES, seconds, strict=True)), NUMBERS):
        names = [f"i{at:02d}" for at in range(len(texts))]
        log = [("u", name, time) for name, time in zip(names, texts, strict=True)]
        write(tmp_path, log, [(name, "t", "", "") for name in names])
        dataset = run(on(engine, configure(tmp_path)), tmp_path / "out")
        found = [dataset.item_ids[int(row)] for row in dataset.sequence(0)]
        assert found == [name for _, name in sorted(zip(texts.values(), names, strict=True))]
    write(tmp_path, [*LOG, *(("u9", "a", bad) for bad in NO_TIMES)])
    with pytest.raises(UserError, match="time is") as caught:
        run(on(engine, configure(tmp_path)), tmp_path / "out")
    assert repr(NO_TIMES[0]) in caught.value.problem
    assert f"{len(NO_TIMES)} such rows" in caught.value.problem  # and no other


def database(folder: Path, kind: str, log: list[Any] = LOG, items: list[Any] = CATALOGUE) -> str:
    """The log and the catalogue as tables of a database; returns the engine's URL."""
    path = folder / f"shop.{kind}"
    connection = sqlite3.connect(path) if kind == "sqlite" else duckdb.connect(str(path))
    connection.execute("CREATE TABLE log (who TEXT, what TEXT, bought BIGINT)")
    connection.executemany("INSERT INTO log VALUES (?, ?, ?)", log)
    connection.execute("CREATE TABLE items (item TEXT, title TEXT, brand TEXT, year TEXT)")
    connection.executemany("INSERT INTO items VALUES (?, ?, ?, ?)", items)
    connection.commit()
    connection.close()
    return f"{kind}://{path}"


def register(log: list[Any], items: list[Any]) -> None:
    """The same as tables of Spark."""
    columns = "item string, title string, brand string, year string"
    spark_session().createDataFrame(log, "who string, what string, bought bigint").createOrReplaceTempView("log")
    spark_session().createDataFrame(items, columns).createOrReplaceTempView("items")


def of_tables(engine: str, **more: str) -> Prepare:
    names = {"table": "log", "user": "who", "item": "what", "time": "bought", **more}
    items = {"table": "items", "item": "item", "title": "title"}
    sections = {"interactions": names, "items": items, "engine": engine, "min_user_interactions": 3}
    return Prepare.model_validate(sections)


@pytest.mark.parametrize("kind", ["duckdb", "sqlite"])
def test_tables_of_a_database_are_read_by_name(tmp_path: Path, kind: str) -> None:
    dataset = run(of_tables(database(tmp_path, kind)), tmp_path / "out")
    write(tmp_path)
    of_files = run(configure(tmp_path), tmp_path / "files")
    assert dataset.item_rows_I.tolist() == of_files.item_rows_I.tolist()
    assert list(dataset.user_ids) == list(of_files.user_ids)
    assert str(tmp_path) not in (tmp_path / "out" / "prepare" / "manifest.json").read_text(), (
        "a URL may hold a password"
    )


def tie(user: str, item: str) -> int:
    """The stated rule, by hand."""
    of_user, of_item = (int(hashlib.md5(text.encode()).hexdigest()[:7], 16) + 1 for text in (user, item))
    return of_user * of_item % 2147483647


@pytest.mark.parametrize("kind", ["duckdb", "sqlite", pytest.param("spark", marks=needs_spark)])
def test_a_table_has_no_order_and_its_ties_follow_neither_the_ids_nor_the_rows(tmp_path: Path, kind: str) -> None:
    names = [f"i{number:02d}" for number in range(30)]
    sequences = []
    for rows in (names, names[::-1]):
        log, items = [("u", name, 5) for name in rows], [(name, "t", "", "") for name in rows]
        folder = tmp_path / rows[0]
        folder.mkdir()
        config = of_tables(kind if kind == "spark" else database(folder, kind, log, items))
        if kind == "spark":
            register(log, items)
            config = on(kind, config)
        dataset = run(config, folder / "out")
        sequences.append([names[row] for row in dataset.item_rows_I])
    assert sequences == [sorted(names, key=lambda name: tie("u", name))] * 2
    assert sequences[0] not in (names, names[::-1])


@pytest.mark.parametrize("kind", ["duckdb", "sqlite"])
def test_a_table_or_column_that_a_database_lacks_is_named(tmp_path: Path, kind: str) -> None:
    url = database(tmp_path, kind)
    with pytest.raises(UserError, match="table logs"):
        run(of_tables(url, table="logs"), tmp_path / "out")
    with pytest.raises(UserError, match=r"table log .*'whom' \(prepare.interactions.user\).* `who`"):
        run(of_tables(url, user="whom"), tmp_path / "out")


@pytest.mark.parametrize("kind", ["TIME", "TIMETZ", "INTERVAL", "INT[]", "BOOLEAN"])
def test_a_column_of_a_wrong_type_is_refused_by_its_table_and_a_view_may_convert_it(tmp_path: Path, kind: str) -> None:
    url = database(tmp_path, "duckdb")
    with duckdb.connect(url.removeprefix("duckdb://")) as connection:
        connection.execute(f"CREATE TABLE wrong AS SELECT who, what, bought, NULL::{kind} AS odd FROM log")
        connection.execute("CREATE VIEW mended AS SELECT who, what, CAST(bought AS TEXT) AS odd FROM wrong")
    for role in ("time", "user"):
        told: list[str] = []
        with pytest.raises(UserError) as caught:
            run(of_tables(url, table="wrong", **{role: "odd"}), tmp_path / "out", told)
        assert caught.value.problem.startswith(f"table wrong: column 'odd' (prepare.interactions.{role}) holds ")
        assert ("timestamps" in caught.value.remedy) == (role == "time")
        assert not [line for line in told if "wrong" in line]  # nothing has been counted
    run(of_tables(url, table="mended", time="odd"), tmp_path / "out")


@needs_spark
def test_a_registered_table_of_spark_is_read_by_name(tmp_path: Path) -> None:
    register(LOG, CATALOGUE)
    dataset = run(on("spark", of_tables("spark")), tmp_path / "out")
    assert dataset.item_rows_I.tolist() == [0, 1, 2, 3, 1, 0, 2]


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("sparks", "engine 'sparks'"),
        ("nosuch://host/db", "nosuch://..."),
        ("duckdb:///nowhere/shop.db", "prepare.engine: duckdb://"),
    ],
)
def test_an_engine_that_is_none_is_refused(tmp_path: Path, engine: str, said: str) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=said):
        run(configure(tmp_path, engine=engine), tmp_path / "out")


@pytest.mark.slow
def test_files_behind_a_url_give_the_same_dataset(tmp_path: Path) -> None:
    write(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "log.csv"), "/shop/log.csv")
    memory.put(str(tmp_path / "items.csv"), "/shop/items.csv")
    local = run(configure(tmp_path), tmp_path / "local")
    for log in ("memory://shop/log.csv", "memory://shop/l*.csv", f"file://{tmp_path}/log.csv"):
        config = configure(tmp_path).model_copy(deep=True)
        config = Prepare.model_validate(
            {
                **config.model_dump(),
                "interactions": {**config.interactions.model_dump(), "path": log},
                "items": {**config.items.model_dump(), "path": "memory://shop/items.csv"},
            }
        )
        found = run(config, tmp_path / "remote")
        assert found.manifest["files"] == local.manifest["files"]
    before = identity_of(config, 0)
    memory.pipe("/shop/items.csv", b"item,title,brand,year\na,t,,\n")
    assert identity_of(config, 0) != before, "another version of the file is noticed"


def test_a_url_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    refuse(tmp_path, "memory://none.csv does not exist", log="x", interactions=at("memory://none.csv"))
    refuse(tmp_path, "nosuch://", "fsspec", interactions=at("nosuch://bucket/log.csv"))


def at(path: str) -> dict[str, str]:
    return {"path": path, "user": "user", "item": "item", "time": "time"}


def test_a_dataset_does_not_remember_what_computed_it(tmp_path: Path) -> None:
    write(tmp_path)
    config = configure(tmp_path)
    assert identity_of(config, 1) == identity_of(config.model_copy(update={"memory": "2GB", "scratch": "/tmp/x"}), 1)
    run(config.model_copy(update={"memory": "1GB", "scratch": str(tmp_path / "scratch")}), tmp_path / "out")
    assert list((tmp_path / "scratch").glob("*")) == []
    assert read_json(tmp_path / "out" / "prepare" / "manifest.json")["engine"] == "duckdb"
    with pytest.raises(UserError, match=r"prepare\.memory"):
        run(config.model_copy(update={"memory": "plenty"}), tmp_path / "other")


@pytest.mark.parametrize("engine", ["duckdb", pytest.param("spark", marks=needs_spark)])
def test_timestamps_and_days_of_parquet_are_times(tmp_path: Path, engine: str) -> None:
    items = [(name, "t", "", "") for name in "abde"]
    for kind in (pa.timestamp("us"), pa.timestamp("us", "Asia/Tokyo"), pa.date32()):
        write(tmp_path, LOG, items, "parquet")
        moments = pa.array(
            [
                datetime(1969, 12, 31, 23, 59, 59, 250_000),
                datetime(2023, 11, 14),
                datetime(2024, 2, 29),
                datetime(2024, 3, 1),
            ]
        )
        times = moments.cast(kind, safe=False)
        log = pa.table({"user": ["u"] * 4, "item": list("bdae"), "time": times})
        pq.write_table(log, tmp_path / "log.parquet")
        config = configure(tmp_path, log="log.parquet", items="items.parquet")
        dataset = run(on(engine, config), tmp_path / "out")
        first = -86_400.0 if kind == pa.date32() else -0.75
        found = pq.read_table(tmp_path / "out" / "prepare" / "interactions.parquet")["time"].to_pylist()
        assert found == [first, 1_699_920_000.0, 1_709_164_800.0, 1_709_251_200.0]
        assert dataset.item_rows_I.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("unit", ["us", "ns"])
def test_a_time_of_day_is_no_time(tmp_path: Path, unit: str) -> None:
    write(tmp_path, suffix="parquet")
    times = pa.array([time(1), time(2)], pa.time64(unit))
    pq.write_table(pa.table({"user": ["u", "u"], "item": ["a", "b"], "time": times}), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"log\.parquet: column 'time' \(prepare\.interactions\.time\) .*(?i:time)"):
        run(configure(tmp_path, log="log.parquet", items="items.parquet"), tmp_path / "out")


@pytest.mark.parametrize("engine", ["duckdb", pytest.param("spark", marks=needs_spark)])
@pytest.mark.parametrize(
    ("bad", "said"), [(float("inf"), "data row 2"), (float("nan"), "data row 2"), (2.0**60, "2**53")]
)
def test_a_position_that_is_none_or_too_large_is_refused(tmp_path: Path, engine: str, bad: float, said: str) -> None:
    write(tmp_path, [("u", item, at) for item, at in zip("abd", (1.0, bad, 3.0), strict=True)], suffix="parquet")
    config = configure(tmp_path, log="log.parquet", items="items.parquet", order="position")
    with pytest.raises(UserError, match=re.escape(said)):
        run(on(engine, config), tmp_path / "out")


def test_minus_zero_is_zero_in_whatever_order_rows_stand(tmp_path: Path) -> None:
    hashes = set()
    for times in ((-0.0, 0.0, 1.0, 2.0, 3.0), (0.0, -0.0, 1.0, 2.0, 3.0)):
        write(tmp_path, [("u", item, time) for item, time in zip("aabde", times, strict=True)])
        hashes.add(tuple(run(configure(tmp_path), tmp_path / "out").manifest["files"].values()))
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["interactions", "items_1", "log", "shop.log"])
def test_a_duckdb_table_may_have_any_name_and_a_schema(tmp_path: Path, name: str) -> None:
    with duckdb.connect(str(tmp_path / "the.db")) as connection:
        connection.execute("CREATE SCHEMA shop")
        connection.execute(f"CREATE TABLE {name} (who TEXT, what TEXT, bought BIGINT)")
        connection.executemany(f"INSERT INTO {name} VALUES (?, ?, ?)", LOG)
        connection.execute("CREATE TABLE items (item TEXT, title TEXT)")
        connection.executemany("INSERT INTO items VALUES (?, ?)", [row[:2] for row in CATALOGUE])
    dataset = run(of_tables(f"duckdb://{tmp_path}/the.db", table=name), tmp_path / "out")
    assert dataset.item_rows_I.tolist() == [0, 1, 2, 3, 1, 0, 2]
    with pytest.raises(UserError, match=r"prepare\.items\.table"):
        run(of_tables("duckdb", table=name), tmp_path / "out")


def test_a_password_is_written_nowhere(tmp_path: Path) -> None:
    config = of_tables("nosuch://me:s3/cr@t@host/shop")
    assert "s3/cr@t" not in dump_config(config)
    assert "nosuch://me:...@host/shop" in dump_config(config)
    rotated = config.model_copy(update={"engine": "nosuch://me:other@host/shop"})
    assert identity_of(config, 0) == identity_of(rotated, 0)
    with pytest.raises(UserError) as caught:
        run(config, tmp_path / "out")
    assert "s3/cr@t" not in str(caught.value)


@needs_spark
def test_a_session_of_the_callers_stays_and_is_as_it_was(tmp_path: Path) -> None:
    write(tmp_path)
    session = spark_session()
    session.conf.set("spark.sql.session.timeZone", "Europe/Berlin")
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(run, on("spark", configure(tmp_path)), tmp_path / "out").result()
    assert session.conf.get("spark.sql.session.timeZone") == "Europe/Berlin"
    assert session.conf.get("spark.sql.caseSensitive") == "false"
    assert session.range(3).count() == 3
    assert not [row for row in session.sql("SHOW VIEWS").collect() if row.viewName.startswith("rarec_")]
    session.conf.unset("spark.sql.session.timeZone")


@needs_spark
@pytest.mark.parametrize(("scratch", "said"), [("nosuch://bucket/tmp", "prepare.scratch"), (None, None)])
def test_spark_keeps_its_results_where_it_is_told_and_leaves_nothing(tmp_path: Path, scratch: str, said: str) -> None:
    write(tmp_path)
    place = scratch or f"file://{tmp_path}/sp ace"
    config = on("spark", configure(tmp_path)).model_copy(update={"scratch": place})
    if said:
        with pytest.raises(UserError, match=said):
            run(config, tmp_path / "out")
        return
    run(config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "ace" in path.name] in (["sp ace"], [])
    assert list((tmp_path / "sp ace").glob("*")) == []
