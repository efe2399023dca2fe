"""Sources: vectors imported in every format, rules and tables of users, permuted sources, and faults on purpose."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from rarec.config.ids import Ids, Import, SasRecConfig
from rarec.errors import UserError
from rarec.ids.imports import read_ids, read_vectors
from rarec.ids.source import HistoryRule, open_source
from tests.datasets import by_hand
from tests.sources import ids_stage, make_source

ITEMS = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.5]], dtype=np.float32)
IDS = ["d", "b", "a", "c"]  # of the file's rows; the dataset's rows are a, b, c, d
ALIGNED = ITEMS[[2, 1, 3, 0]]
USERS = np.array([[2.0, 0.0], [0.0, 3.0]], dtype=np.float32)


@pytest.fixture
def dataset():
    return by_hand([[0, 1, 2, 3], [3, 2, 1, 0]], pa.array(["a", "b", "c", "d"]), pa.array([20, 10]))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Item vectors in every format, lists of ids in every format, and user vectors, in the current directory."""
    monkeypatch.chdir(tmp_path)
    np.save("items.npy", ITEMS)
    save_file({"vectors": ITEMS}, "items.safetensors")
    pq.write_table(pa.table({"vector": ITEMS.tolist(), "id": IDS}), "items.parquet")
    Path("ids.txt").write_text("\n".join(IDS) + "\n")
    np.save("ids.npy", np.array(IDS))
    pq.write_table(pa.table({"item": IDS, "other": [1, 2, 3, 4]}), "ids.parquet")
    np.save("users.npy", USERS)
    Path("user_ids.txt").write_text("10\n20\n")
    return tmp_path


OUT = Path("out/ids/image")


def make(dataset, root="out", say=lambda line: None, **fields):
    config = Import(**{"items": "items.npy", "item_ids": "ids.txt", **fields})
    return make_source("image", config, dataset, Path(root), say=say, fresh=True)


# -- what comes in --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("files")
def test_a_list_of_ids_may_have_a_byte_order_mark_and_lines_end_where_editors_end_them():
    Path("marked.txt").write_bytes("\ufeffB1\r\nB\u20282\nB\x1d3".encode())
    assert read_ids("marked.txt").to_pylist() == ["B1", "B\u20282", "B\x1d3"]


@pytest.mark.usefixtures("files")
def test_ids_may_be_of_another_machines_order_of_bytes():
    np.save("big.npy", np.array([3, 1, 4], ">i8"))
    assert read_ids("big.npy").to_pylist() == [3, 1, 4]


@pytest.mark.usefixtures("files")
def test_unsigned_ids_that_fit_no_signed_integer_are_compared_as_text():
    np.save("large.npy", np.array([3, 2**63 + 1, 4, 5], np.uint64))
    vectors = read_vectors("items.npy", "large.npy", "items", "item_ids")
    vectors.write_aligned(Path("aligned.npy"), pa.array([5, 3]), "item", "")
    assert (np.load("aligned.npy") == ITEMS[[3, 0]]).all()


@pytest.mark.parametrize("ids", ["ids.txt", "ids.npy", "ids.parquet"])
@pytest.mark.parametrize("items", ["items.npy", "items.safetensors"])
def test_arrays_are_aligned_by_original_id(dataset, files, items, ids):
    source = make(dataset, items=items, item_ids=ids)
    assert source.items_NE.tolist() == ALIGNED.tolist()
    assert isinstance(source.items_NE, np.memmap)
    assert (source.name, source.dim, source.vectors_per_user) == ("image", 2, 1)


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 2)])
def test_parquet_brings_its_own_ids(dataset, files, kind):
    vectors = pa.array(ITEMS.tolist(), type=kind)
    pq.write_table(pa.table({"vector": vectors, "id": IDS}), "items.parquet")
    assert make(dataset, items="items.parquet", item_ids=None).items_NE.tolist() == ALIGNED.tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_other_number_types_become_float32(dataset, files, dtype):
    whole = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], dtype=dtype)
    np.save("items.npy", whole)
    source = make(dataset)
    assert source.items_NE.dtype == np.float32
    assert source.items_NE.tolist() == whole[[2, 1, 3, 0]].tolist()


def test_bfloat16_tensors_are_read(dataset, files):
    save_torch({"x": torch.from_numpy(ITEMS).bfloat16()}, "items.safetensors")
    assert make(dataset, items="items.safetensors").items_NE.tolist() == ALIGNED.tolist()


def test_ids_of_different_types_compare_as_text(files):
    dataset = by_hand([[0, 1, 2, 3]], pa.array([7, 8, 9, 10]), pa.array(["u"]))
    Path("ids.txt").write_text("10\n8\n7\n9\n")
    assert make(dataset).items_NE.tolist() == ALIGNED.tolist()
    np.save("ids.npy", np.array([10, 8, 7, 9], dtype=np.int32))
    assert make(dataset, item_ids="ids.npy").items_NE.tolist() == ALIGNED.tolist()


def test_extra_rows_are_counted_and_may_hold_anything(dataset, files):
    """Such as the padding row of most ID models."""
    np.save("items.npy", np.vstack([np.full((1, 2), np.nan), ITEMS]))
    Path("ids.txt").write_text("\n".join(["[PAD]", *IDS]))
    lines: list[str] = []
    source = make(dataset, say=lines.append)
    assert source.items_NE.tolist() == ALIGNED.tolist()
    assert source.manifest["left_out"] == {"items": 1}
    assert "items.npy: 1 rows" in lines[0]


def test_whether_gaps_are_refused_makes_another_source(dataset, files):
    make(dataset)
    lenient = Import(items="items.npy", item_ids="ids.txt", missing="fallback")
    with pytest.raises(UserError, match='missing: "refuse" -> "fallback"'):
        ids_stage("image", lenient, dataset, Path("out")).make()


def test_items_without_a_vector_may_be_left_to_the_fallback(dataset, files):
    np.save("items.npy", ITEMS[:2])
    Path("ids.txt").write_text("d\nb")
    lines: list[str] = []
    source = make(dataset, missing="fallback", say=lines.append)
    assert source.items_NE.tolist() == [[0, 0], ITEMS[1].tolist(), [0, 0], ITEMS[0].tolist()]
    assert source.ranker().items_NZ[0].tolist() == ITEMS[:2].mean(axis=0).tolist()
    assert "2 of 4 items" in lines[0]


# -- users ----------------------------------------------------------------------------------------------------------


def test_user_rules_by_hand(dataset, files):
    """History a, b, c (rows 0, 1, 2): oldest first."""
    history, rows = [np.array([0, 1, 2])], np.array([0])
    mean = make(dataset, user_rule="mean").user_vectors(rows, history)
    assert mean.shape == (1, 1, 2)
    assert mean.dtype == np.float32
    assert mean[0, 0] == pytest.approx(ALIGNED[:3].mean(axis=0))
    last = make(dataset, user_rule="last").user_vectors(rows, history)
    assert last[0, 0].tolist() == ALIGNED[2].tolist()
    recent = make(dataset, user_rule="recency", half_life=1.0).user_vectors(rows, history)
    assert recent[0, 0] == pytest.approx((0.25 * ALIGNED[0] + 0.5 * ALIGNED[1] + ALIGNED[2]) / 1.75)
    short = make(dataset, user_rule="mean", max_history=2).user_vectors(rows, history)
    assert short[0, 0] == pytest.approx(ALIGNED[1:3].mean(axis=0))


def test_user_rules_skip_items_without_a_vector():
    items = np.array([[1, 2], [3, 4], [0, 0]], np.float32)
    for rule in ("mean", "last", "recency"):
        users = HistoryRule.of(rule, 2.0, 2)
        rows, histories = np.arange(3), [np.array([0, 2, 1, 2]), np.array([0, 1]), np.array([2])]
        gap, without, none = users.vectors(items, rows, histories)
        assert gap.tolist() == without.tolist()
        assert none.tolist() == [[0, 0]]


def test_histories_of_a_batch_do_not_touch_each_other():
    rule = HistoryRule.of("recency", 2.0, 4)
    rng = np.random.default_rng(0)
    items = rng.standard_normal((9, 3)).astype(np.float32)
    histories = [rng.integers(9, size=length) for length in (0, 1, 3, 4, 9)]
    together = rule.vectors(items, np.arange(5), histories)
    alone = [rule.vectors(items, np.array([0]), [history])[0] for history in histories]
    assert np.allclose(together, alone, atol=1e-6)
    assert (together[0] == 0).all()
    assert rule.vectors(items, np.arange(0), []).shape == (0, 1, 3)


def test_user_tables_are_aligned_by_original_id(dataset, files):
    source = make(dataset, users="users.npy", user_ids="user_ids.txt")
    assert source.user_vectors(np.array([0, 1, 0]), [np.array([0])] * 3)[:, 0].tolist() == USERS[[1, 0, 1]].tolist()


def test_a_user_table_may_hold_several_vectors_a_user(dataset, files):
    several = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    np.save("users.npy", several)
    source = make(dataset, users="users.npy", user_ids="user_ids.txt")
    assert source.vectors_per_user == 3
    assert source.user_vectors(np.array([0]), [np.array([0])]).tolist() == several[[1]].tolist()


def test_its_own_ranking_score_is_kept_and_said(dataset, files):
    """Validation: user 0 read a, b and meets c; user 1 read d, c and meets b. Rule `last`: scores are e_last . e_i."""
    lines: list[str] = []
    source = make(dataset, user_rule="last", say=lines.append)
    # user 0: b = (0, 1) scores c .5, d 0: rank 1. User 1: c = (-1, .5) scores b .5, a -.5: rank 1.
    assert source.manifest["validation"]["mrr"] == 1.0
    assert source.manifest["validation"]["n"] == 2
    assert "ndcg@10 1.0000" in lines[-1]


# -- the artefact ---------------------------------------------------------------------------------------------------


def test_a_source_reopens_exactly(dataset, files):
    for number, fields in enumerate(({"half_life": 3.0}, {"users": "users.npy", "user_ids": "user_ids.txt"})):
        made = make(dataset, root=f"out{number}", **fields)
        opened = open_source(Path(f"out{number}/ids/image"))
        rows, histories = np.array([0, 1]), [np.array([0, 3, 1]), np.array([2])]
        assert opened.user_vectors(rows, histories).tolist() == made.user_vectors(rows, histories).tolist()
        assert (opened.hash, opened.manifest) == (made.hash, made.manifest)


def test_writing_to_a_source_leaves_its_file(dataset, files):
    """Memory-mapped copy-on-write: torch takes it without a copy, and the artefact cannot change."""
    source = make(dataset)
    torch.from_numpy(np.asarray(source.items_NE)).zero_()
    assert open_source(OUT).items_NE.tolist() == ALIGNED.tolist()


def test_identity_follows_contents_not_paths(dataset, files):
    make(dataset)
    assert not ids_stage("image", Import(items="items.npy", item_ids="ids.txt"), dataset, Path("out")).make()
    Path("items.npy").rename("moved.npy")
    moved = ids_stage("image", Import(items="moved.npy", item_ids="ids.txt"), dataset, Path("out"))
    assert not moved.make()
    np.save("moved.npy", ITEMS + 1)
    with pytest.raises(UserError, match="another items"):
        moved.make()
    Path("moved.npy").unlink()
    with pytest.raises(UserError, match=r"`sources.image.items`: moved.npy does not exist"):
        moved.make()


def test_identity_of_a_trained_source_is_its_recipe(dataset, files):
    stage = ids_stage("id", Ids(sasrec=SasRecConfig(dim=8)), dataset, Path("out"), seed=5)
    assert (stage.settings()["seed"], stage.settings()["users"]["dim"], stage.outside_inputs()) == (5, 8, {})
    assert set(stage.inputs()) == {"prepare", "start"}  # it goes on from the ID model of the older half
    alone = ids_stage("id", Ids(sasrec=SasRecConfig(dim=8), holdout=0.0), dataset, Path("out"), seed=5)
    assert set(alone.inputs()) == {"prepare"}
    imported = Ids(model="import", imported=Import(items="items.npy", item_ids="ids.txt"))
    assert ids_stage("id", imported, dataset, Path("out"), seed=5).settings()["users"]["kind"] == "rule"


def test_a_refused_import_may_be_corrected_and_is_made_then(dataset, files):
    """Though its items were written before its users were refused."""
    Path("user_ids.txt").write_text("10\n30")
    with pytest.raises(UserError, match=r"users\.npy"):
        make(dataset, users="users.npy", user_ids="user_ids.txt")
    Path("user_ids.txt").write_text("10\n20")
    assert make(dataset, users="users.npy", user_ids="user_ids.txt").manifest["left_out"] == {"items": 0, "users": 0}


def test_a_corrupt_source_is_named(dataset, files):
    make(dataset)
    file = OUT / "items.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"{OUT} .*\n.*rarec ids CONFIG --fresh"):
        open_source(OUT)


def test_permuting_moves_vectors_among_items_and_users_follow(dataset, files):
    source = make(dataset, user_rule="last")
    shuffled = source.permuted(0)
    assert sorted(shuffled.items_NE.tolist()) == sorted(source.items_NE.tolist())
    assert shuffled.items_NE.tolist() != source.items_NE.tolist()
    assert shuffled.user_vectors(np.array([0]), [np.array([2])])[0, 0].tolist() == shuffled.items_NE[2].tolist()
    assert shuffled.hash != source.hash
    assert shuffled.hash == source.permuted(0).hash != source.permuted(1).hash
    assert source.items_NE.tolist() == ALIGNED.tolist()


def test_permuting_a_user_table_permutes_users(files):
    dataset = by_hand([[0, 1, 2, 3]] * 6, pa.array(["a", "b", "c", "d"]), pa.array(range(6)))
    np.save("users.npy", np.arange(12, dtype=np.float32).reshape(6, 2))
    Path("user_ids.txt").write_text("0\n1\n2\n3\n4\n5")
    source = make(dataset, users="users.npy", user_ids="user_ids.txt")
    everyone, histories = np.arange(6), [np.array([0])] * 6
    before = source.user_vectors(everyone, histories)[:, 0].tolist()
    after = source.permuted(0).user_vectors(everyone, histories)[:, 0].tolist()
    assert sorted(after) == sorted(before)
    assert after != before


# -- faults ---------------------------------------------------------------------------------------------------------


def refuse(dataset, match, **fields):
    """The import is refused, and nothing is left behind."""
    with pytest.raises(UserError, match=match):
        make(dataset, **fields)
    assert not OUT.exists()
    assert not [path for path in OUT.parent.glob("*") if path.name != ".image.lock"]


def write(name: str, content) -> None:
    """Write a file of vectors or ids in the current directory, in the format of its name."""
    if name.endswith(".parquet"):
        pq.write_table(pa.table(content), name)
    elif name.endswith(".safetensors"):
        save_file(content, name)
    elif name.endswith(".npy"):
        np.save(name, content, allow_pickle=True)
    else:
        Path(name).write_bytes(content)


def poisoned(value: float) -> np.ndarray:
    vectors = ITEMS.astype(np.float64)
    vectors[3, 1] = value
    return vectors


TABLE = {"items": "items.parquet", "item_ids": None}
TENSORS = {"items": "items.safetensors"}
USER_FILES = {"users": "users.npy", "user_ids": "user_ids.txt"}
NOT_FINITE = r"`sources\.image\.items`: items\.npy: .*item 'c' \(row 3\).* NaN"
RAGGED = r"items\.parquet .*id 'c' \(row 3\) has \d .*2"
FAULTS = {
    "missing items": (
        {"items.npy": ITEMS[:2], "ids.txt": b"d\nb"},
        r"`sources\.image\.items`: items\.npy: .*2 of 4 items .*'a', 'c'",
        {},
    ),
    "no item at all": (
        {"items.npy": ITEMS[:2], "ids.txt": b"y\nz"},
        r"`sources\.image\.items`: items\.npy: .*'y', 'z'.*'a', 'b', 'c', 'd'",
        {"missing": "fallback"},
    ),
    "a zero vector": (
        {"items.npy": ITEMS * np.array([[1], [0], [1], [1]], np.float32)},
        r"items\.npy: .*1 of 4 items .*'b'.*\n.*`sources\.image\.missing: fallback`",
        {},
    ),
    "missing users": ({"user_ids.txt": b"10\n30"}, r"users\.npy: .*1 of 2 users .*20", USER_FILES),
    "users of another dimension": (
        {"users.npy": np.zeros((2, 3), np.float32)},
        r"users\.npy .*\(2, 3\).* items\.npy .*2",
        USER_FILES,
    ),
    "NaN": ({"items.npy": poisoned(np.nan)}, NOT_FINITE, {}),
    "infinity": ({"items.npy": poisoned(np.inf)}, NOT_FINITE, {}),
    "beyond float32": ({"items.npy": poisoned(1e300)}, NOT_FINITE, {}),
    "a null inside a vector": (
        {"items.parquet": {"id": IDS, "vector": [*ITEMS[:3].tolist(), [None, 1.0]]}},
        r"items\.parquet: .*item 'c' \(row 3\)",
        TABLE,
    ),
    "a longer vector": ({"items.parquet": {"id": IDS, "vector": [*ITEMS[:3].tolist(), [1.0] * 3]}}, RAGGED, TABLE),
    "an empty vector": ({"items.parquet": {"id": IDS, "vector": [*ITEMS[:3].tolist(), []]}}, RAGGED, TABLE),
    "a null vector": ({"items.parquet": {"id": IDS, "vector": [*ITEMS[:3].tolist(), None]}}, RAGGED, TABLE),
    "a repeated id": ({"ids.txt": b"a\nb\na\nc"}, r"ids\.txt: .*'a'.*\n.*one row per id", {}),
    "a row without an id": (
        {"items.parquet": {"id": ["a", None, "b", "c"], "vector": ITEMS.tolist()}},
        r"items\.parquet: row 1 ",
        TABLE,
    ),
    "fewer ids than rows": (
        {"ids.txt": b"a\nb\nc"},
        r"`sources\.image\.item_ids`: ids\.txt .*3 ids.*items\.npy .*4 rows",
        {},
    ),
    "a pickle": ({"items.npy": np.array([{"evil": 1}] * 4)}, r"items\.npy is not .*\n.*np\.save", {}),
    "a pickle of ids": ({"ids.npy": np.array(IDS, object)}, r"ids\.npy is not .*\n.*np\.save", {"item_ids": "ids.npy"}),
    "several vectors of an item": ({"items.npy": np.zeros((4, 2, 2), np.float32)}, r"shape \(4, 2, 2\)", {}),
    "two tensors": (
        {"items.safetensors": {"a": ITEMS, "b": ITEMS}},
        r"items\.safetensors .*2 tensors \(a, b\)",
        TENSORS,
    ),
    "other columns": (
        {"items.parquet": {"item": IDS, "vector": ITEMS.tolist()}},
        r"items\.parquet .*\"id\".*\n.*`id` and `vector`",
        TABLE,
    ),
    "numbers instead of vectors": (
        {"items.parquet": {"id": IDS, "vector": [1.0] * 4}},
        r"items\.parquet .*`vector`.*double",
        TABLE,
    ),
    "no ids": ({}, r"items\.npy .*\n.*`sources\.image\.item_ids`", {"item_ids": None}),
    "ids twice": ({}, r"`sources.image.item_ids`: items\.parquet ", {"items": "items.parquet"}),
    "ids that are not UTF-8": ({"ids.txt": b"\xff\xfe\xff"}, r"ids\.txt is not UTF-8.*\n.*UTF-8", {}),
    "a missing file": ({}, r"`sources.image.items`: none\.npy does not exist", {"items": "none.npy"}),
    "a missing list of ids": ({}, r"`sources.image.item_ids`: none\.txt does not exist", {"item_ids": "none.txt"}),
    "another format": (
        {},
        r"`sources.image.items`: ids\.txt .*\n.*\.npy, \.safetensors, \.parquet",
        {"items": "ids.txt"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_imported_is_refused_by_file_row_and_remedy(dataset, files, fault):
    written, match, fields = FAULTS[fault]
    for name, content in written.items():
        write(name, content)
    refuse(dataset, match, **fields)


def test_zero_vectors_may_be_left_to_the_fallback(dataset, files):
    np.save("items.npy", ITEMS * np.array([[1], [0], [1], [1]], np.float32))
    assert make(dataset, missing="fallback").items_NE[1].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["items.npy", "items.safetensors", "items.parquet"])
def test_files_that_are_not_what_they_are_called_are_named(dataset, files, name):
    Path(name).write_bytes(b"something else")
    refuse(dataset, rf"{name} is not .*\n.*save", items=name, item_ids=None if name.endswith("parquet") else "ids.txt")


def test_the_manifest_is_plain_json(dataset, files):
    make(dataset)
    manifest = json.loads((OUT / "manifest.json").read_text())
    assert manifest["imported"] == {"items": "items.npy", "item_ids": "ids.txt"}
    assert set(manifest["made_from"]) == {"prepare", "items", "item_ids"}
