"""The tool that makes Amazon Beauty's tables: what is published, made small by hand; each file at fault is named."""

import gzip
import json
import sys

import pyarrow.parquet as pq
import pytest

from rarec.errors import UserError
from tools import make_beauty

METADATA = (
    "{'asin': 'B2', 'title': 'Oil &amp; \"Balm\"', 'salesRank': {'Beauty': 461765}, 'categories': [['Beauty']]}\n"
    "{'asin': 'B3', 'title': 'sold by nobody'}\n"
    "{'asin': 'B1', 'imUrl': 'http://...'}\n"
)
WHOLE = {
    "Beauty.txt": b"1 1 2\n2 2 1 3\n",
    "datamaps.json": json.dumps({"id2user": {}, "id2item": {"10": "B10", "1": "B1", "2": "B2"}}).encode(),
    "meta.json.gz": gzip.compress(METADATA.encode(), mtime=0),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the tool with these files, but for those that are given."""

    def call(**files: bytes) -> None:
        for name, content in {**WHOLE, **files}.items():
            (tmp_path / name).write_bytes(content)
        given = [*(tmp_path / name for name in WHOLE), tmp_path / "made"]
        monkeypatch.setattr(sys, "argv", ["make_beauty.py", *map(str, given)])
        make_beauty.main()

    return call


def test_a_line_is_a_user_and_an_item_is_known_by_its_asin(run, tmp_path, capsys):
    run()
    message = capsys.readouterr().out
    assert "2 users, 3 items, 5 interactions" in message
    assert "items without a title: 2" in message
    log = pq.read_table(tmp_path / "made/interactions.parquet").to_pydict()
    assert log == {"user_id": [1, 1, 2, 2, 2], "item_id": [1, 2, 2, 1, 3], "position": [0, 1, 0, 1, 2]}
    items = pq.read_table(tmp_path / "made/items.parquet").to_pydict()
    assert items == {"item_id": [1, 2, 10], "asin": ["B1", "B2", "B10"], "title": [None, 'Oil & "Balm"', None]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Beauty.txt", b"1 1 2\n2 2 one\n", "line 2"),
        ("Beauty.txt", b"1 1 2\n2\n", "line 2"),
        ("Beauty.txt", b"1 1 2\n\n2 2\n", "line 2"),
        ("Beauty.txt", b"", "Beauty"),
        ("datamaps.json", b"{}", "'id2item'"),
        ("datamaps.json", b"[1", "datamaps"),
        ("meta.json.gz", b"{'asin': 'B1'}", "gzip"),
        ("meta.json.gz", WHOLE["meta.json.gz"][:-20], "metadata"),
        ("meta.json.gz", WHOLE["meta.json.gz"][:40] + b"\0" * 60, "metadata"),
        ("meta.json.gz", gzip.compress(b"import os", mtime=0), "metadata"),
    ],
)
def test_the_file_at_fault_is_named_and_nothing_written(run, tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as refused:
        run(**{name: content})
    assert str(tmp_path / name) in str(refused.value)
    assert not (tmp_path / "made").exists()


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_beauty.py", *map(str, map(tmp_path.joinpath, WHOLE)), str(tmp_path)])
    with pytest.raises(UserError, match=r"Beauty\.txt"):
        make_beauty.main()
