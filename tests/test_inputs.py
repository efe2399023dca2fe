"""Logs are what they seem, or are refused by file and column, alike on every engine."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rarec.config.schema import Interactions
from rarec.data.engines import PrepareEngine
from rarec.data.engines.table_checks import check_gzip
from rarec.data.engines.table_files import find_files
from rarec.data.preparation.inputs import check_order, read_log, table_location
from rarec.errors import UserError

CSV = "user,item,time\n" + "".join(f"{row % 7},{row % 11},{1_500_000_000 + row}\n" for row in range(3_000))
JSONL = "".join(
    json.dumps({"user": row % 7, "item": f"i{row % 11}", "time": 1_500_000_000 + row}) + "\n" for row in range(3_000)
)
TEXTS = {"csv.gz": CSV, "jsonl.gz": JSONL}


def read(engine: PrepareEngine, path: Path | str, **fields: Any) -> list[dict[str, Any]]:
    """Read a log as the preparation does, with its check for times."""
    config = Interactions.model_validate({"path": str(path), "user": "user", "item": "item", "time": "time", **fields})
    location = table_location(config, "prepare.interactions")
    check_order(engine, config, location, read_log(engine, config, location))
    return engine.rows(read_log(engine, config, location, lines=True).order_by("line"))


def refuse(engine: PrepareEngine, path: Path | str, *parts: str, **fields: Any) -> None:
    with pytest.raises(UserError) as caught:
        read(engine, path, **fields)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert caught.value.remedy
    assert all(len(line) < 700 for line in str(caught.value).splitlines())


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


HARMS: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the checksum": lambda data: flipped(data, len(data) - 6),
    "a bit of the length": lambda data: flipped(data, len(data) - 1),
    "a bit of the text": lambda data: flipped(data, len(data) // 2),
    "no end": lambda data: data[:-8],
    "half an end": lambda data: data[:-4],
    "half": lambda data: data[: len(data) // 2],
    "a header alone": lambda data: data[:10],
    "garbage behind": lambda data: data + b"garbage",
    "another member, cut": lambda data: data + gzip.compress(b"1,2,3\n")[:-5],
    "not compressed": gzip.decompress,
    "another compression": lambda data: zlib.compress(gzip.decompress(data)),
}


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_a_damaged_gzip_is_refused_by_its_name(
    embedded: PrepareEngine, tmp_path: Path, suffix: str, harm: Callable[[bytes], bytes]
) -> None:
    whole = gzip.compress(TEXTS[suffix].encode())
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / f"a.{suffix}").write_bytes(whole)
    (tmp_path / "log" / f"b.{suffix}").write_bytes(harm(whole))
    refuse(embedded, tmp_path / "log", f"b.{suffix}")


def test_a_gzip_of_several_members_is_whole(embedded: PrepareEngine, tmp_path: Path) -> None:
    head, rest = CSV[:1_015], CSV[1_015:]
    (tmp_path / "log.csv.gz").write_bytes(
        gzip.compress(head.encode()) + gzip.compress(b"") + gzip.compress(rest.encode())
    )
    assert len(read(embedded, tmp_path / "log.csv.gz")) == 3_000


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_no_damage_to_a_gzip_passes_unless_the_text_is_the_same(
    tmp_path: Path, place: int, bit: int, cut: bool
) -> None:
    whole = gzip.compress(CSV.encode(), mtime=0)
    place %= len(whole)
    data = bytearray(whole)
    data[place] ^= 1 << bit
    path = tmp_path / "log.csv.gz"
    path.write_bytes(whole[:place] if cut else bytes(data))
    if not path.stat().st_size:
        return
    try:
        check_gzip(find_files(str(path), "x"))
    except UserError as error:
        assert "log.csv.gz" in error.problem  # noqa: PT017 - most harms are refused, and some change nothing
    else:
        assert gzip.decompress(path.read_bytes()) == CSV.encode()  # a flag or the time in the header


def test_a_damaged_gzip_behind_a_url_is_refused(embedded: PrepareEngine) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/inputs/log.csv.gz", flipped(gzip.compress(CSV.encode()), -6))
    refuse(embedded, "memory://inputs/log.csv.gz", "log.csv.gz")
    files.pipe("/inputs/log.csv.gz", gzip.compress(CSV.encode()))
    assert len(read(embedded, "memory://inputs/log.csv.gz")) == 3_000


def test_a_page_of_parquet_that_differs_from_its_checksum_is_refused(engine: PrepareEngine, tmp_path: Path) -> None:
    rows = {"user": [*range(2_000)], "item": [*range(2_000)], "time": [1_500_000_000 + row for row in range(2_000)]}
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "write_statistics": False}
    pq.write_table(pa.table(rows), tmp_path / "log.parquet", **options)
    assert len(read(engine, tmp_path / "log.parquet")) == 2_000
    data = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(flipped(data, 9_000))
    refuse(engine, tmp_path / "log.parquet", "log.parquet")


def csv_of(path: Path, *times: object) -> Path:
    path.write_text("user,item,time\n" + "".join(f"u{row},i,{time}\n" for row, time in enumerate(times)))
    return path


SECONDS, MILLIS, MICROS, NANOS = 1_500_000_000, 1_500_000_000_000, 1_500_000_000_000_000, 1_500_000_000_000_000_000


@pytest.mark.parametrize(
    ("times", "row"),
    [
        ((SECONDS, MILLIS, SECONDS), 1),
        ((MILLIS, MILLIS, MICROS), 1),
        ((NANOS, SECONDS), 2),
        ((MILLIS, 0), 2),
        ((MILLIS, 1), 2),
        (("2017-07-14", SECONDS), 2),
        ((SECONDS, "2017-07-14T02:40:00Z", "2017-07-15"), 1),
        ((f"{SECONDS}.5", "2017-07-14"), 1),
    ],
)
def test_a_column_of_mixed_times_is_refused_with_the_first_row_unlike_the_others(
    embedded: PrepareEngine, tmp_path: Path, times: tuple[object, ...], row: int
) -> None:
    named = (f"log.csv, data row {row} ", f"time is {str(times[row - 1])!r}", "prepare.interactions.time ")
    refuse(embedded, csv_of(tmp_path / "log.csv", *times), *named)


@pytest.mark.parametrize("one", [SECONDS, SECONDS + 0.5])
def test_units_are_compared_over_all_files_and_in_numbers(engine: PrepareEngine, tmp_path: Path, one: float) -> None:
    (tmp_path / "log").mkdir()
    for name, time in {"a": one, "b": type(one)(MILLIS)}.items():
        pq.write_table(pa.table({"user": [1], "item": [1], "time": [time]}), tmp_path / "log" / f"{name}.parquet")
    refuse(engine, tmp_path / "log", "prepare.interactions.time", "data row 1")


def test_times_that_seem_mixed_are_read_in_the_unit_that_is_given(embedded: PrepareEngine, tmp_path: Path) -> None:
    path = csv_of(tmp_path / "log.csv", MILLIS, 0, 5_000)
    refuse(embedded, path, "prepare.interactions.time_unit")
    assert [row["order"] for row in read(embedded, path, time_unit="ms")] == [1.5e9, 0.0, 5.0]


@pytest.mark.parametrize(("unit", "time"), [("s", SECONDS), ("ms", MILLIS), ("us", MICROS), ("ns", NANOS)])
def test_a_unit_that_is_given_is_the_one_that_is_found(
    embedded: PrepareEngine, tmp_path: Path, unit: str, time: int
) -> None:
    path = csv_of(tmp_path / "log.csv", time, time + 10**6)
    assert read(embedded, path, time_unit=unit) == read(embedded, path)


NO_TIMES = [
    "-1", "-0.5", "inf", "-inf", "nan", "NaN", "1e400", "1e30", "0001-01-01", "1899-12-31", "9999-12-31", "2200-01-02",
    "30000-01-01", "20200101123000", "true", "-62135596800",
]  # fmt: skip


@pytest.mark.parametrize("time", NO_TIMES)
def test_a_time_that_is_none_is_refused_with_its_row(embedded: PrepareEngine, tmp_path: Path, time: str) -> None:
    names = ("log.csv, data row 1 ", repr(time), "prepare.interactions.time")
    refuse(embedded, csv_of(tmp_path / "log.csv", time), *names)


def test_engines_agree_on_what_is_no_time(engine: PrepareEngine, tmp_path: Path) -> None:
    dates = [time for time in NO_TIMES if "-" in time[1:]]
    other_units = ["1e30", "20200101123000"]
    for times in (dates, [time for time in NO_TIMES if time not in (*dates, *other_units)]):
        refuse(engine, csv_of(tmp_path / "log.csv", *times), "row 1 ", repr(times[0]), f"{len(times)} such rows")


@pytest.mark.parametrize("moment", [datetime(1, 1, 1), date(1, 1, 1), datetime(9999, 12, 31), -1, float("inf"), True])
def test_a_typed_time_that_is_none_is_refused(engine: PrepareEngine, tmp_path: Path, moment: object) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user": [1, 2], "item": [1, 2], "time": pa.array([moment, moment])}), path)
    refuse(engine, path, "log.parquet", "time")


def jsonl_of(path: Path, *users: str) -> Path:
    path.write_text("".join(f'{{"user": {user}, "item": "i{row}", "time": {row}}}\n' for row, user in enumerate(users)))
    return path


NO_IDS = {
    "objects": ('{"a": 1}', '{"a": 2}'),
    "lists": ("[1]", "[2]"),
    "truth": ("true", "false"),
    "number and text": ("1", '"1"'),
    "number and object": ("1", '{"a": 1}'),
    "text and object": ('"a"', '{"a": 1}'),
    "text and truth": ('"a"', "true"),
    "number and truth": ("1", "true"),
    "list and object": ("[1]", '{"a": 1}'),
    "fractions": ("1.5", "2.5"),
    "a fraction": ("1", "2.5"),
    "more than a number holds": ("1e400", "1"),
    "an integer of 30 digits": ("1", "1" * 30),
}


@pytest.mark.parametrize("users", NO_IDS.values(), ids=NO_IDS.keys())
def test_values_of_json_that_are_no_ids_are_refused(
    embedded: PrepareEngine, tmp_path: Path, users: tuple[str, ...]
) -> None:
    refuse(embedded, jsonl_of(tmp_path / "log.jsonl", *users), "log.jsonl", "prepare.interactions.user")
    (tmp_path / "log").mkdir()
    for row, user in enumerate(users):
        jsonl_of(tmp_path / "log" / f"{row}.jsonl", user)
    refuse(embedded, tmp_path / "log", "prepare.interactions.user")


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        (("1", "null", "2"), [1, None, 2]),
        (('"1"', "null", '"a b "'), ["1", None, "a b "]),
        (("1", "2.0"), [1, 2]),
        (('"a"', '" a"'), ["a", " a"]),
    ],
)
def test_values_of_json_that_are_ids_are_taken(
    embedded: PrepareEngine, tmp_path: Path, users: tuple[str, ...], expected: list[object]
) -> None:
    assert [row["user"] for row in read(embedded, jsonl_of(tmp_path / "log.jsonl", *users))] == expected


def test_a_field_that_a_line_of_json_has_twice_is_refused(embedded: PrepareEngine, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"user": 1, "item": 1, "time": 1, "user": 2}\n')
    refuse(embedded, tmp_path / "log.jsonl", "log.jsonl", "user")


@pytest.mark.parametrize("name", ["it's", 'say "x"', "a/b", "a.b", "$", "ü", "a~0b", "back\\slash", "[0]"])
def test_fields_of_json_may_have_any_name(embedded: PrepareEngine, tmp_path: Path, name: str) -> None:
    lines = [{name: user, "item": "i", "time": 1} for user in ("a", 1)]
    (tmp_path / "log.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert [row["user"] for row in read(embedded, tmp_path / "log.jsonl", user=name)] == ["a"]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    refuse(embedded, tmp_path / "log.jsonl", "prepare.interactions.user", user=name)


COLUMNS: dict[str, pa.Array] = {
    "integers": pa.array([1, 2]),
    "floats": pa.array([1.0, 2.0]),
    "text": pa.array(["1", "2"]),
    "truth": pa.array([True, False]),
    "dates": pa.array([date(2020, 1, 1), date(2020, 1, 2)]),
}


@pytest.mark.parametrize("other", [name for name in COLUMNS if name != "integers"])
@pytest.mark.parametrize("turn", [1, -1])
def test_files_of_parquet_with_ids_of_two_types_are_refused(
    engine: PrepareEngine, tmp_path: Path, other: str, turn: int
) -> None:
    (tmp_path / "log").mkdir()
    for name, column in zip("ab", [COLUMNS["integers"], COLUMNS[other]][::turn], strict=True):
        pq.write_table(pa.table({"user": column, "item": [1, 2], "time": [1, 2]}), tmp_path / "log" / f"{name}.parquet")
    refuse(engine, tmp_path / "log", "b.parquet", "'user'")


def test_integers_of_two_widths_are_of_one_type(embedded: PrepareEngine, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    for name, kind in {"a": pa.int32(), "b": pa.int64(), "c": pa.null()}.items():
        column = pa.nulls(2) if kind == pa.null() else pa.array([1, 2], kind)
        pq.write_table(pa.table({"user": column, "item": [1, 2], "time": [1, 2]}), tmp_path / "log" / f"{name}.parquet")
    assert [row["user"] for row in read(embedded, tmp_path / "log")] == [1, 2, 1, 2, None, None]


@pytest.mark.parametrize("kind", ["truth", "dates"])
def test_a_column_of_parquet_that_holds_no_ids_is_refused(engine: PrepareEngine, tmp_path: Path, kind: str) -> None:
    pq.write_table(pa.table({"user": COLUMNS[kind], "item": [1, 2], "time": [1, 2]}), tmp_path / "log.parquet")
    refuse(engine, tmp_path / "log.parquet", "log.parquet", "prepare.interactions.user")


def test_a_parquet_file_with_two_columns_of_a_name_is_refused(engine: PrepareEngine, tmp_path: Path) -> None:
    table = pa.table([[1], [2], ["i"], [1]], names=["user", "user", "item", "time"])
    pq.write_table(table, tmp_path / "log.parquet")
    refuse(engine, tmp_path / "log.parquet", "log.parquet", "user")


AS_NOBODY = """
import os, sys
from rarec.config.load import load_config
from rarec.data.engines.table_files import find_files
from rarec.errors import UserError
from rarec.ids.imports import read_vectors
read = {
    "config": load_config,
    "vectors": lambda path: read_vectors(path, None, "items", "item_ids"),
    "log": lambda path: find_files(path, "prepare.items.path"),
}
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for what, path in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        read[what](path)
        print("read")
    except UserError as error:
        print("refused:", str(error).replace("\\n", " "))
"""
CLOSED = [
    ("config", "run.yaml", "run.yaml"),
    ("config", "inside/run.yaml", "inside"),
    ("vectors", "x.npy", "x.npy"),
    ("vectors", "x.parquet", "x.parquet"),
    ("vectors", "x.safetensors", "x.safetensors"),
    ("log", "log.csv.gz", "log.csv.gz"),
    ("log", "log.parquet", "log.parquet"),
    ("log", "inside", "inside"),
    ("log", "inside", "inside/a.csv"),
    ("log", "above", "above/inside"),
]
"""What is read, its name, and the file or folder in it that another user closed."""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_another_user_closed_may_not_be_read_which_is_what_is_said() -> None:
    root = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are closed to others
    try:
        root.chmod(0o755)
        given = [closed_example(root / str(number), *example) for number, example in enumerate(CLOSED)]
        arguments = [
            word for (what, name, _), place in zip(CLOSED, given, strict=True) for word in (what, place / name)
        ]
        done = subprocess.run([sys.executable, "-c", AS_NOBODY, *arguments], capture_output=True, text=True, check=True)
        for line, (_, _, closed), place in zip(done.stdout.splitlines(), CLOSED, given, strict=True):
            assert line.startswith("refused: ")
            assert str(place / closed) in line
            assert "ermission" in line or "may not be read" in line
    finally:
        shutil.rmtree(root)


def closed_example(root: Path, what: str, name: str, closed: str) -> Path:
    """Make a folder with files of an example, one of them closed to others."""
    (root / "above" / "inside").mkdir(parents=True)
    (root / "inside").mkdir()
    for file in (name, "inside/a.csv", "above/b.csv", "above/inside/c.csv"):
        if not (root / file).is_dir():
            (root / file).write_bytes(b"user,item,time\n1,2,3\n")
    (root / closed).chmod(0o700 if (root / closed).is_dir() else 0o600)
    return root
