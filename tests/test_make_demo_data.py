"""The tool that cuts the demo's slice, on tables written by hand, and the slice as a new user's YAML names it."""

import csv
import gzip
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rarec.config.load import load_config
from rarec.data.engines.table_files import find_files
from rarec.errors import UserError
from tools import make_demo_data

DAY = 24 * 60 * 60
FIRST_DAY = int(make_demo_data.SINCE.timestamp())
CHOSEN, OTHER = 12346, 12347


def write_tables(directory, log):
    directory.mkdir()
    users, items, times = zip(*log, strict=True)
    pq.write_table(
        pa.table({"user_id": users, "item_id": items, "timestamp": times, "quantity": [1] * len(log)}),
        directory / "interactions.parquet",
    )
    catalogue = {"item_id": ["f", *"edcba"], "title": ["NEVER SOLD", *(f"{x} BOX, RED" for x in "EDCBA")]}
    pq.write_table(pa.table(catalogue), directory / "items.parquet")


def run(monkeypatch, *paths):
    monkeypatch.setattr(sys, "argv", ["make_demo_data.py", *map(str, paths)])
    make_demo_data.main()


def test_the_slice_holds_first_purchases_of_the_chosen_customers_in_time_order(tmp_path, monkeypatch):
    assert make_demo_data.is_chosen(CHOSEN)
    assert not make_demo_data.is_chosen(OTHER)
    five = [(CHOSEN, item, FIRST_DAY + day * DAY) for day, item in enumerate("edcba")]
    before = [(CHOSEN, "f", FIRST_DAY - 1)]
    again = [(CHOSEN, "e", FIRST_DAY + 9 * DAY)]
    fewer = [(12354, item, FIRST_DAY) for item in "abcd"]
    assert make_demo_data.is_chosen(fewer[0][0])
    write_tables(tmp_path / "tables", [*again, *five, *before, *fewer, *((OTHER, *row[1:]) for row in five)])
    for name in ("made", "again"):
        run(monkeypatch, tmp_path / "tables", tmp_path / name)
    with gzip.open(tmp_path / "made/interactions.csv.gz", "rt") as file:
        header, *rows = csv.reader(file)
    assert header == ["customer", "product", "time"]
    assert rows == [[str(CHOSEN), item, f"2010-12-0{day + 1} 00:00"] for day, item in enumerate("edcba")]
    with (tmp_path / "made/items.csv").open() as file:
        assert list(csv.reader(file)) == [["product", "title"], *([x, f"{x.upper()} BOX, RED"] for x in "abcde")]
    for name in ("interactions.csv.gz", "items.csv"):
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_purchases_of_one_minute_are_shuffled_whatever_the_order_of_the_table(tmp_path, monkeypatch):
    once = [(CHOSEN, item, FIRST_DAY) for item in "abcde"]
    slices = []
    for name, log in (("sorted", once), ("reversed", once[::-1])):
        (tmp_path / name).mkdir()
        write_tables(tmp_path / name / "tables", log)
        run(monkeypatch, tmp_path / name / "tables", tmp_path / name / "made")
        slices.append((tmp_path / name / "made/interactions.csv.gz").read_bytes())
    products = [line.split(",")[1] for line in gzip.decompress(slices[0]).decode().split()[1:] if "," in line]
    assert slices[0] == slices[1]
    assert products == sorted("abcde", key=lambda item: make_demo_data.shuffled_place(CHOSEN, item)) != list("abcde")


def test_a_missing_table_is_named_and_nothing_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"interactions\.parquet"):
        run(monkeypatch, tmp_path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_demos_tables_are_found_inside_the_package():
    demo = load_config(make_demo_data.Path(__file__).parents[1] / "configs/runs/demo.yaml").prepare
    for table in (demo.interactions, demo.items):
        files = find_files(str(table.path), "prepare")
        assert files.format == "csv"
        assert all("rarec/examples/online_retail" in path for path in files.paths)
