"""Test the opened dataset, and that it refuses changed files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarec.config.schema import Prepare
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.storage.files import read_json, write_json
from tests.datasets import by_hand, column_of, prepare_dataset
from tests.synthetic import write_log


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make(tmp_path_factory.mktemp("dataset"))


def make(folder: Path) -> PreparedDataset:
    log, items = write_log(folder, users=30, items=20)
    interactions = {"path": str(log), "user": "user", "item": "item", "time": "time"}
    catalogue = {"path": str(items), "item": "item", "title": "title", "text": ["brand"]}
    config = Prepare.model_validate({"interactions": interactions, "items": catalogue})
    return prepare_dataset(config, folder)


def test_arrays_have_their_shapes_and_types(dataset: PreparedDataset) -> None:
    users, items = dataset.n_users, dataset.n_items
    assert (users, items) == (30, 20) == (len(dataset.user_ids), len(dataset.titles))
    assert dataset.train_counts_N.dtype == np.int64
    for array in (dataset.train_length_U, dataset.validation_U, dataset.test_U, dataset.lengths_U):
        assert (array.dtype, array.shape) == (np.int32, (users,))
    assert dataset.item_rows_I.dtype == np.int32
    assert len(dataset.item_rows_I) == dataset.lengths_U.sum() == dataset.manifest["counts"]["interactions"]
    assert dataset.titles[5] == "stone lamp 5"
    assert dataset.texts[5] == "STONE"


def test_sequences_and_histories(dataset: PreparedDataset) -> None:
    for user in range(dataset.n_users):
        sequence = dataset.sequence(user)
        assert len(set(sequence.tolist())) == len(sequence) == dataset.lengths_U[user]
        assert dataset.history(user, 3).tolist() == sequence[:3].tolist()
        assert len(dataset.history(user, 0)) == 0


def test_training_samples_are_every_training_position_with_a_history(dataset: PreparedDataset) -> None:
    users, positions = dataset.training_samples()
    lengths = enumerate(dataset.train_length_U.tolist())
    expected = [(user, position) for user, length in lengths for position in range(1, length)]
    assert list(zip(users.tolist(), positions.tolist(), strict=True)) == expected
    assert len(users) == dataset.manifest["counts"]["training_samples"]
    assert users.dtype == positions.dtype == np.int32
    items = dataset.items_at(users, positions)
    assert items.tolist() == [dataset.sequence(user)[position] for user, position in expected]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), most=st.integers(1, 30))
def test_blocks_are_runs_of_users_as_large_as_the_bound_allows(lengths: list[int], most: int) -> None:
    sequences = [[0] * length for length in lengths]
    dataset = by_hand(sequences, pa.array([0]), pa.array(range(len(lengths))))
    blocks = list(dataset.user_blocks(most))
    assert [user for block in blocks for user in range(len(lengths))[block]] == list(range(len(lengths)))
    for block in blocks:
        assert sum(lengths[block]) <= most or block.stop - block.start == 1
        assert block.stop == len(lengths) or sum(lengths[block.start : block.stop + 1]) > most


@pytest.mark.parametrize("values", [list(range(300_000)), [f"title {at}" for at in range(300_000)]])
def test_a_column_has_its_values_in_any_order_and_in_slices(values: list[int] | list[str]) -> None:
    column = column_of(values)
    assert len(column) == len(values)
    assert list(column) == column.whole().to_pylist() == values
    rows = np.array([299_999, 0, 131_072, 131_071, 5, 5, 262_144])
    assert column.take(rows).to_pylist() == [values[row] for row in rows] == [column[int(row)] for row in rows]
    assert column.take(rows[:0]) == column.whole().slice(0, 0)
    assert column[131_070:131_074] == values[131_070:131_074]
    assert column[-1] == values[-1]


def test_holding_out_shortens_the_training_part_alone_and_leaves_one() -> None:
    sequences = [[0, 1, 2, 3, 8, 9], [4, 0, 8, 9], [5, 8, 9]]
    held = by_hand(sequences, pa.array(range(10)), pa.array(range(3))).holding_out(0.5)
    assert held.train_length_U.tolist() == [2, 1, 1]
    assert held.train_counts_N.tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    assert held.validation_U.tolist() == [4, 2, 1]
    assert held.history(0, 4).tolist() == [0, 1, 2, 3]


def test_targets_are_the_last_two_of_each_user(dataset: PreparedDataset) -> None:
    for part, back in (("test", 1), ("validation", 2)):
        targets = dataset.targets(part)  # type: ignore[arg-type]
        assert targets.user_rows.tolist() == list(range(30))
        assert targets.positions.tolist() == (dataset.lengths_U - back).tolist()
        assert targets.item_rows.tolist() == [dataset.sequence(user)[-back] for user in range(30)]


def test_a_limit_takes_a_fixed_random_subset_in_the_order_of_the_rows(dataset: PreparedDataset) -> None:
    some, again, other = (dataset.targets("test", 7, seed) for seed in (1, 1, 2))
    assert len(some.user_rows) == 7
    assert some.user_rows.tolist() == again.user_rows.tolist() == sorted(set(some.user_rows.tolist()))
    assert some.user_rows.tolist() != other.user_rows.tolist()
    assert some.item_rows.tolist() == [dataset.sequence(user)[-1] for user in some.user_rows]
    assert len(dataset.targets("test", 100).user_rows) == 30


def test_opening_refuses_what_is_missing_changed_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rarec prepare CONFIG"):
        PreparedDataset.open(tmp_path / "nowhere")
    directory = make(tmp_path).directory
    items = directory / "items.parquet"
    content = bytearray(items.read_bytes())
    content[100] ^= 1
    items.write_bytes(content)
    with pytest.raises(UserError, match=r"items\.parquet .*altered"):
        PreparedDataset.open(directory)
    items.unlink()
    with pytest.raises(UserError, match=r"items\.parquet"):
        PreparedDataset.open(directory)
    write_json(directory / "manifest.json", read_json(directory / "manifest.json") | {"kind": "shards"})
    with pytest.raises(UserError, match="prepare"):
        PreparedDataset.open(directory)
