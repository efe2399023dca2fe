"""Files of vectors and ids are what they seem, or are refused in a line that names them; nothing is unpickled."""

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rarec.errors import UserError
from rarec.ids.imports import Vectors, read_vectors

GOOD = np.arange(6, dtype=np.float32).reshape(2, 3)
LISTS = [[1.0, 2.0], [3.0, 4.0]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids.txt").write_text("a\nb\n")
    np.save(tmp_path / "good.npy", GOOD)
    return tmp_path


def read(path: str, ids: str | None = "ids.txt") -> Vectors:
    vectors = read_vectors(path, ids, "ids.imported.items", "ids.imported.item_ids")
    vectors.write_aligned(Path("out.npy"), pa.array(["a", "b"]), "item", "export all")
    return vectors


def refuse(path: str, ids: str | None = "ids.txt", named: str | None = None) -> None:
    with pytest.raises(UserError) as caught:
        read(path, ids)
    said = str(caught.value)
    assert (named or path) in said
    assert caught.value.remedy
    assert "\n" not in caught.value.problem
    assert len(caught.value.problem) < 400
    assert "allow_pickle" not in said


def header(shape: str, kind: str = "'<f4'") -> bytes:
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(24)


class Payload:
    """Create a file when unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("ran"),)


ARRAYS = {
    "objects": np.array([[Payload()] * 3] * 2, object),
    "one axis": GOOD[0],
    "no axis": np.float32(1),
    "four axes": GOOD.reshape(2, 1, 1, 3),
    "no rows": GOOD[:0],
    "no columns": GOOD[:, :0],
    "NaN": GOOD * np.nan,
    "infinity": GOOD + np.inf,
    "beyond float32": GOOD.astype("f8") * 1e300,
    "complex": GOOD + 1j,
    "text": GOOD.astype(str),
    "bytes": GOOD.astype("S"),
    "truth": GOOD > 1,
    "fields": np.zeros(2, [("a", "f4")]),
    "dates": np.zeros((2, 3), "M8[s]"),
    "raw": np.zeros((2, 3), "V4"),
    "three rows": np.ones((3, 3), "f4"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_no_vectors_are_refused(here: Path, name: str) -> None:
    np.save("x.npy", ARRAYS[name], allow_pickle=True)
    refuse("x.npy")
    assert not Path("ran").exists()


SHAPES = [
    "(10**30, 3)", "(9223372036854775807, 9223372036854775807)", "(4611686018427387904, 4)",
    "(18446744073709551616, 3)", "(-2, 3)", "(99999999999, 3)", "('a', 3)", "(2, 3", "(True, 3)", "(2.0, 3)", "2", "()",
    "__import__('os').abort()",
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_headers_of_impossible_shapes_are_refused(here: Path, shape: str) -> None:
    (here / "x.npy").write_bytes(header(shape))
    refuse("x.npy")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 151), byte=st.integers(0, 255), cut=st.booleans())
def test_any_byte_of_a_file_of_vectors_may_be_wrong(here: Path, place: int, byte: int, cut: bool) -> None:
    data = (here / "good.npy").read_bytes()
    assert len(data) == 152
    (here / "x.npy").write_bytes(data[:place] if cut else data[:place] + bytes([byte]) + data[place + 1 :])
    try:
        rows = read("x.npy").rows
    except UserError as error:
        assert "x.npy" in str(error)  # noqa: PT017 - some bytes do no harm
        return
    assert rows.ndim in (2, 3)


def test_archives_and_pickles_are_no_vectors(here: Path) -> None:
    np.savez("x.npz", GOOD)
    refuse("x.npz")
    Path("x.npz").rename("x.npy")
    refuse("x.npy")
    Path("x.npy").write_bytes(pickle.dumps(Payload()))
    refuse("x.npy")
    refuse("good.npy", "x.npy", "x.npy")
    assert not Path("ran").exists()


IDS = {
    "fractions": np.array([1.5, 2]),
    "NaN": np.array([np.nan, 1]),
    "infinity": np.array([np.inf, 1]),
    "truth": np.array([True, False]),
    "complex": np.array([1j, 2]),
    "objects": np.array(["a", Payload()], object),
    "fields": np.zeros(2, [("a", "i4")]),
    "two axes": np.zeros((2, 1), int),
    "no axis": np.array(1),
    "dates": np.array(["2020", "2021"], "M8[Y]"),
    "seconds": np.array([1, 2], "m8[s]"),
    "an empty one": np.array(["a", ""]),
    "a repeated one": np.array(["a", "a"]),
    "one more": np.array(["a", "b", "c"]),
    "raw": np.zeros(2, "V4"),
    "not UTF-8": np.array([b"\xff", b"b"]),
}


@pytest.mark.parametrize("name", IDS)
def test_arrays_that_are_no_ids_are_refused(here: Path, name: str) -> None:
    np.save("ids.npy", IDS[name], allow_pickle=True)
    refuse("good.npy", "ids.npy", "ids.npy")
    assert not Path("ran").exists()


@pytest.mark.parametrize("text", ["a\n", "a\nb\nc\n", "a\na\n", "", "a\n\n", "\nb\n", "a\n\nb"])
def test_lists_of_ids_that_do_not_fit_are_refused(here: Path, text: str) -> None:
    Path("list.txt").write_text(text)
    refuse("good.npy", "list.txt", "list.txt")


TABLES = {
    "no rows": pa.table({"id": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32()))}),
    "texts": pa.table({"id": ["a", "b"], "vector": [["x"], ["y"]]}),
    "matrices": pa.table({"id": ["a", "b"], "vector": [[[1.0]], [[2.0]]]}),
    "a missing vector": pa.table({"id": ["a", "b"], "vector": [None, [1.0]]}),
    "no vector": pa.table({"id": ["a", "b"], "vector": pa.array([None, None], pa.list_(pa.float32()))}),
    "empty vectors": pa.table({"id": ["a", "b"], "vector": pa.array([[], []], pa.list_(pa.float32()))}),
    "two columns of ids": pa.table([["a", "b"], ["c", "d"], LISTS], names=["id", "id", "vector"]),
    "lists as ids": pa.table({"id": [["a"], ["b"]], "vector": LISTS}),
    "objects as ids": pa.table({"id": [{"a": 1}, {"a": 2}], "vector": LISTS}),
    "fractions as ids": pa.table({"id": [1.5, 2.5], "vector": LISTS}),
    "NaN as an id": pa.table({"id": [float("nan"), 2.0], "vector": LISTS}),
    "truth as ids": pa.table({"id": [True, False], "vector": LISTS}),
    "an empty id": pa.table({"id": ["", "b"], "vector": LISTS}),
    "bytes as ids": pa.table({"id": [b"\xff", b"b"], "vector": LISTS}),
    "dates as ids": pa.table({"id": pa.array([1, 2], pa.date32()), "vector": LISTS}),
    "truth in vectors": pa.table({"id": ["a", "b"], "vector": [[True], [False]]}),
    "no columns": pa.table({}),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_are_no_vectors_are_refused(here: Path, name: str) -> None:
    pq.write_table(TABLES[name], "x.parquet")
    refuse("x.parquet", None)
    if name in ("lists as ids", "objects as ids", "no columns"):
        refuse("good.npy", "x.parquet", "x.parquet")


def test_damaged_tables_are_refused(here: Path) -> None:
    table = pa.table({"id": ["a", "b"], "vector": LISTS})
    options = {"compression": "none", "write_page_checksum": True, "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, "x.parquet", **options)
    read("x.parquet", None)
    data = Path("x.parquet").read_bytes()
    place = data.index(struct.pack("<d", 3.0))
    Path("x.parquet").write_bytes(data[:place] + b"\1" + data[place + 1 :])
    refuse("x.parquet", None)
    Path("x.parquet").write_bytes(data[:-50])
    refuse("x.parquet", None)


@pytest.mark.parametrize("kind", [torch.bool, torch.complex64])
def test_tensors_that_are_no_numbers_are_refused(here: Path, kind: torch.dtype) -> None:
    save_file({"vectors": torch.ones(2, 3, dtype=kind)}, "x.safetensors")
    refuse("x.safetensors")


@pytest.mark.parametrize("start", [struct.pack("<Q", 2**60) + b"{}", b"", b"<html>", b"\xff" * 100])
def test_damaged_tensors_are_refused(here: Path, start: bytes) -> None:
    (here / "x.safetensors").write_bytes(start)
    refuse("x.safetensors")


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2, 3], [-2, 3], []])
def test_tensors_of_another_shape_than_their_bytes_are_refused(here: Path, shape: list[int]) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    (here / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    refuse("x.safetensors")
