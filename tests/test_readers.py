"""Test that tables of all formats are read the same way, and that unreadable input is named."""

import csv
import gzip
import json
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.csv import write_csv

from rarec.config.schema import Interactions, Items
from rarec.data.engines import PrepareEngine, compute_value
from rarec.data.engines.table_files import find_files, hash_files
from rarec.data.preparation.inputs import read_catalogue, read_log, table_location
from rarec.errors import UserError

FORMATS = ("csv", "csv.gz", "tsv", "parquet", "jsonl", "ndjson", "inter")


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """Write rows in the format that the suffix names; None is a missing value."""
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.table({name: [row[at] for row in rows] for at, name in enumerate(columns)}), path)
    elif kind in ("jsonl", "ndjson"):
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    elif kind in ("inter", "item"):
        header = "\t".join(f"{name}:token" for name in columns)
        lines = ["\t".join("" if value is None else str(value) for value in row) for row in rows]
        path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    else:
        opened = gzip.open if kind.endswith("gz") else open
        with opened(path, "wt", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows([columns, *rows])
    return path


def read(engine: PrepareEngine, path: Path | str, time: str = "time", user: str = "user") -> list[dict[str, Any]]:
    config = Interactions(path=str(path), user=user, item="item", time=time)
    log = read_log(engine, config, table_location(config, "prepare.interactions"), lines=True)
    return engine.rows(log.order_by("line"))


ROWS = [(7, "a b", 3.5, "x"), (-12, "ü'ö", 1.0, "y"), (0, "c", 2.0, "z")]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_rows_in_order_with_other_columns_ignored(
    engine: PrepareEngine, tmp_path: Path, suffix: str
) -> None:
    path = write_table(tmp_path / f"log.{suffix}", ["user", "item", "time", "more"], ROWS)
    found = read(engine, path)
    assert [(row["line"], row["user"], row["item"]) for row in found] == [(1, 7, "a b"), (2, -12, "ü'ö"), (3, 0, "c")]
    assert [row["order"] for row in found] == [3.5, 1.0, 2.0]


@pytest.mark.parametrize(
    "ids", [["007", "7"], ["7", "x"], ["+7", "8"], ["7.0", "8"], ["9" * 19, "1"], ["2020-01-01", "2"], ["-0", "1"]]
)
def test_a_csv_column_with_one_id_that_is_no_canonical_integer_stays_text(
    embedded: PrepareEngine, tmp_path: Path, ids: list[str]
) -> None:
    path = write_table(tmp_path / "log.csv", ["user", "item", "time"], [(value, "i", 1) for value in ids])
    assert [row["user"] for row in read(embedded, path)] == ids


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_digits_that_the_file_calls_text_stay_text(engine: PrepareEngine, tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path / f"log.{suffix}", ["user", "item", "time"], [("7", 1, 1), ("8", 2, 2)])
    assert [(row["user"], row["item"]) for row in read(engine, path)] == [("7", 1), ("8", 2)]


def test_whole_floats_are_integers_as_a_null_makes_them_in_pandas(engine: PrepareEngine, tmp_path: Path) -> None:
    path = write_table(tmp_path / "log.parquet", ["user", "item", "time"], [(7.0, 1e9, 1), (None, 2.0, 2)])
    assert [(row["user"], row["item"]) for row in read(engine, path)] == [(7, 10**9), (None, 2)]
    path = write_table(tmp_path / "nan.parquet", ["user", "item", "time"], [(7.0, 1.0, 1), (float("nan"), 2.0, 2)])
    assert [(row["user"], row["item"]) for row in read(engine, path)] == [(7, 1), (None, 2)]


@pytest.mark.parametrize("bad", [1.5, 1e300, float("inf")])
def test_a_float_that_is_no_integer_is_no_id(engine: PrepareEngine, tmp_path: Path, bad: float) -> None:
    path = write_table(tmp_path / "log.parquet", ["user", "item", "time"], [(7.0, "a", 1), (bad, "b", 2)])
    refuse(engine, path, "prepare.interactions.user", "1 of them")


def test_ids_of_any_length_stay_apart(engine: PrepareEngine, tmp_path: Path) -> None:
    snowflakes = [(2**63 - 1, "a", 1), (2**63 - 2, "b", 2)]
    for suffix in ("csv", "jsonl", "parquet"):
        rows = read(engine, write_table(tmp_path / f"log.{suffix}", ["user", "item", "time"], snowflakes))
        assert [row["user"] for row in rows] == [2**63 - 1, 2**63 - 2]
    decimals = pa.array([Decimal("12345678901234567.01"), Decimal("12345678901234567.02")], pa.decimal128(30, 2))
    unsigned = pa.array([2**64 - 1, 2**64 - 2], pa.uint64())
    for column in (decimals, unsigned):
        pq.write_table(pa.table({"user": column, "item": ["a", "b"], "time": [1, 2]}), tmp_path / "log.parquet")
        assert [row["user"] for row in read(engine, tmp_path / "log.parquet")] == [str(v) for v in column.to_pylist()]


def test_a_newline_at_the_end_is_part_of_an_id(embedded: PrepareEngine, tmp_path: Path) -> None:
    path = write_table(tmp_path / "log.csv", ["user", "item", "time"], [("7\n", "a", 1), ("8", "b", 2)])
    assert [row["user"] for row in read(embedded, path)] == ["7\n", "8"]


def test_a_path_is_no_pattern_and_may_hold_anything(engine: PrepareEngine, tmp_path: Path) -> None:
    write_table(tmp_path / "log1.csv", ["user", "item", "time"], [("other", "i", 1)])
    (tmp_path / "sp ace ü+%20").mkdir()
    for name in ("log[1].csv", "sp ace ü+%20/l{a,b}.csv"):
        path = write_table(tmp_path / name, ["user", "item", "time"], [("mine", "i", 1)])
        assert [row["user"] for row in read(engine, path)] == ["mine"]


def test_lists_of_json_are_json_and_those_of_parquet_are_refused(engine: PrepareEngine, tmp_path: Path) -> None:
    rows = [("i", ["A", "B c"]), ("j", ["D"])]
    config = Items(path=str(write_table(tmp_path / "a.jsonl", ["item", "title"], rows)), item="item", title="title")
    catalogue = read_catalogue(engine, config, table_location(config, "prepare.items"), print)[0]
    assert [row["title"] for row in engine.rows(catalogue.order_by("line"))] == ['["A","B c"]', '["D"]']
    config = Items(path=str(write_table(tmp_path / "a.parquet", ["item", "title"], rows)), item="item", title="title")
    with pytest.raises(UserError, match=r"a\.parquet.*'title' \(prepare.items.title\).*array"):
        read_catalogue(engine, config, table_location(config, "prepare.items"), print)


def test_two_objects_on_a_line_are_not_read_as_one(embedded: PrepareEngine, tmp_path: Path) -> None:
    line = '{"user": "u", "item": "i", "time": 1}'
    (tmp_path / "log.jsonl").write_text(f"{line}\n{line}{line}\n")
    refuse(embedded, tmp_path / "log.jsonl", "log.jsonl")


def test_the_mark_for_broken_text_may_be_text(embedded: PrepareEngine, tmp_path: Path) -> None:
    path = write_table(tmp_path / "log.csv", ["user", "item", "time"], [("u\ufffd", "i", 1)])
    assert read(embedded, path)[0]["user"] == "u\ufffd"


def test_every_file_of_a_table_needs_the_columns(engine: PrepareEngine, tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", ["user", "item", "time"], [("u", "i", 1)])
    write_table(tmp_path / "b.parquet", ["user", "Item", "time"], [("u", "i", 1)])
    refuse(engine, tmp_path, "b.parquet", "'item'")
    (tmp_path / "c.csv").write_text("user,item,time,item\nu,i,1,j\n")
    refuse(engine, tmp_path / "c.csv", "c.csv", "'item'")


def test_times_in_nanoseconds_or_days(embedded: PrepareEngine, tmp_path: Path) -> None:
    moments = [datetime(2023, 11, 14, 22, 13, 20, 250_000), datetime(2023, 11, 15)]
    for kind in (pa.timestamp("ns"), pa.timestamp("ns", "UTC"), pa.timestamp("us", "Europe/Berlin"), pa.timestamp("s")):
        times = pa.array(moments, pa.timestamp("us")).cast(kind, safe=False)
        pq.write_table(pa.table({"user": ["u", "u"], "item": ["a", "b"], "time": times}), tmp_path / "log.parquet")
        assert [row["order"] for row in read(embedded, tmp_path / "log.parquet")] in (
            [1_700_000_000.25, 1_700_006_400.0],
            [1_700_000_000.0, 1_700_006_400.0],
        )


def test_a_hidden_directory_is_read_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "_data" / "logs").mkdir(parents=True)
    write_table(tmp_path / "_data" / "logs" / "a.csv", ["user", "item", "time"], [("u", "i", 1)])
    assert len(find_files(f"{tmp_path}/./_data/logs", "f").paths) == 1


def test_quotes_belong_to_csv_and_are_plain_characters_in_recbole_files(
    embedded: PrepareEngine, tmp_path: Path
) -> None:
    quoted = tmp_path / "a.csv"
    quoted.write_text('\ufeffuser,item,time\r\n"u, ""1""","two\nlines",1\r\n,"",2\r\n', encoding="utf-8")
    assert [(row["user"], row["item"]) for row in read(embedded, quoted)] == [('u, "1"', "two\nlines"), (None, None)]
    plain = tmp_path / "b.inter"
    plain.write_text('user:token\titem:token\ttime:float\nu\t"half\t1\nv\tit"s\t2\n')
    assert [row["item"] for row in read(embedded, plain)] == ['"half', 'it"s']


def test_names_that_differ_by_case_alone_are_two_columns(embedded: PrepareEngine, tmp_path: Path) -> None:
    path = write_table(tmp_path / "log.csv", ["Item", "item", "user", "time"], [("A", "b", "u", 1)])
    assert read(embedded, path)[0]["item"] == "b"


def test_linked_folders_are_read_and_links_that_lead_back_are_not(tmp_path: Path) -> None:
    for day in ("day1", "elsewhere"):
        (tmp_path / day).mkdir()
        write_table(tmp_path / day / f"{day}.csv", ["user", "item", "time"], [("u", "i", 1)])
    logs = tmp_path / "logs"
    logs.mkdir()
    for name, to in {"day1": tmp_path / "day1", "day2": tmp_path / "elsewhere", "back": logs}.items():
        (logs / name).symlink_to(to)
    expected = [str(logs / "day1/day1.csv"), str(logs / "day2/elsewhere.csv")]
    assert list(find_files(str(logs), "f").paths) == expected
    (logs / "back").unlink()
    assert list(find_files(f"{logs}/**/*.csv", "f").paths) == expected


def test_a_directory_and_a_glob_are_read_by_name_and_hidden_files_skipped(
    embedded: PrepareEngine, tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    (folder / "deep").mkdir(parents=True)
    for name, user in (("b.csv", "u2"), ("a.csv", "u1"), ("deep/c.csv", "u3"), (".x.csv", "no"), ("_y.csv", "no")):
        write_table(folder / name, ["user", "item", "time"], [(user, "i", 1)])
    (folder / "_SUCCESS").touch()
    assert [row["user"] for row in read(embedded, folder)] == ["u1", "u2", "u3"]
    assert [row["user"] for row in read(embedded, folder / "[ab].csv")] == ["u1", "u2"]
    one, all_of_them = (hash_files(find_files(str(path), "f")) for path in (folder / "a.csv", folder))
    assert one != all_of_them


@pytest.mark.parametrize("suffix", ["parquet", "csv", "csv.gz"])
@pytest.mark.parametrize("more", [(), ("File_Row_Number", "_file", "_metadata")])
def test_rows_are_numbered_in_the_order_of_files_by_name_and_of_rows(
    engine: PrepareEngine, tmp_path: Path, suffix: str, more: tuple[str, ...]
) -> None:
    """Whatever the names of files and columns: engines have columns of their own for these numbers."""
    count = 300_000
    rows = pa.table({name: pa.array(range(count)) for name in ("user", "item", "time", *more)})
    cuts = [0, 100_000, 250_000, 250_000, count]
    for name, start, end in zip(["a+%20", "b [1]", "b c", "ü"], cuts, cuts[1:], strict=False):
        part = rows[start:end]
        if suffix == "parquet":
            pq.write_table(part, tmp_path / f"{name}.parquet", row_group_size=10_000)
        else:
            with pa.output_stream(tmp_path / f"{name}.{suffix}") as file:  # compresses by the name
                write_csv(part, file)
    config = Interactions(path=f"{tmp_path}/*.{suffix}", user="user", item="item", time="time")
    log = read_log(engine, config, table_location(config, "f"))
    assert compute_value(engine, log.count()) == count
    assert compute_value(engine, log.count(where=log.line != log.user + 1)) == 0


def refuse(engine: PrepareEngine, path: Path | str, *parts: str, **columns: str) -> None:
    with pytest.raises(UserError) as caught:
        read(engine, path, **columns)
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_missing_column_is_named_with_the_nearest_and_all_that_are_there(
    engine: PrepareEngine, tmp_path: Path, suffix: str
) -> None:
    path = write_table(tmp_path / f"log.{suffix}", ["item", "user", "zTime"], [("i", "u", 1)])
    refuse(engine, path, str(path), "no column 'time' (prepare.interactions.time)", "`zTime`?", "item, user, zTime")


def test_what_is_not_there_or_empty_is_refused(embedded: PrepareEngine, tmp_path: Path) -> None:
    refuse(embedded, tmp_path / "none.csv", "prepare.interactions.path", "none.csv does not exist", ".parquet")
    (tmp_path / "empty.csv").touch()
    refuse(embedded, tmp_path / "empty.csv", "empty.csv is empty")
    for suffix in ("csv", "inter", "tsv"):
        path = write_table(tmp_path / f"header.{suffix}", ["user", "item", "time"], [])
        refuse(embedded, path, str(path), "rows")
    (tmp_path / "log.xls").write_text("x")
    refuse(embedded, tmp_path / "log.xls", "log.xls has no known suffix", ".jsonl")
    write_table(tmp_path / "mixed.parquet", ["user", "item", "time"], [("u", "i", 1)])
    refuse(embedded, tmp_path / "[hm]*.*", "several formats")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("log.csv", b"user,item,time\nu1,i1,1\nu2,i2\n", ("Line: 3", "Expected Number of Columns: 3 Found: 2")),
        ("log.csv", b"user,item,time\nu\xff,i1,1\n", ("Line: 2", "utf-8")),
        ("log.csv", b"us\xffer,item,time\nu,i1,1\n", ("row 1", "UTF-8")),
        ("log.csv", b"\n\n", ("no header",)),
        ("log.inter", b"user:token\titem:token\ttime:float\nu\ti\t1\t9\n", ("Line: 2", "Found: 4")),
        ("log.jsonl", b'{"user": 1, "item": 2, "time": 3}\n{"user": 1,\n', ("Malformed JSON", "line")),
        ("log.jsonl", b"[1, 2]\n", ("JSON objects",)),
        ("log.parquet", b"not parquet at all", ("No magic bytes",)),
        ("log.csv.gz", b"not gzip", ("cannot be read",)),
    ],
)
def test_rows_that_cannot_be_read_are_named(
    embedded: PrepareEngine, tmp_path: Path, name: str, content: bytes, parts: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    refuse(embedded, tmp_path / name, str(tmp_path / name), *parts)


def test_files_of_one_table_need_one_header(embedded: PrepareEngine, tmp_path: Path) -> None:
    write_table(tmp_path / "a.csv", ["user", "item", "time"], [("u", "i", 1)])
    write_table(tmp_path / "b.csv", ["item", "user", "time"], [("i", "u", 1)])
    refuse(embedded, tmp_path, "b.csv", "item, user, time", "header")
