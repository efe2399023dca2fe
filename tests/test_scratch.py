"""Tables larger than memory: they are kept in files that nobody sees, and hold the same."""

import numpy as np
import pytest

from rarec.data.tables import Scratch
from rarec.entry import open_run
from rarec.models.encode import Encoder
from rarec.stages.shard_content import ShardContent
from rarec.stages.train import TrainStage


def test_a_table_beyond_the_bound_takes_no_memory_and_no_name(tmp_path):
    scratch = Scratch(100, tmp_path / "run")
    small, large = scratch.zeros((5, 5), np.float32), scratch.zeros((5, 6), np.float32)
    assert not isinstance(small.base, np.memmap)
    assert isinstance(large.base, np.memmap)
    assert large.sum() == 0
    large[3] = 7
    assert large.sum() == 42
    assert list((tmp_path / "run").iterdir()) == []
    assert not isinstance(Scratch().zeros((9, 9), np.float64).base, np.memmap)


def test_a_disk_without_room_is_an_error_and_not_a_killed_process(tmp_path):
    with pytest.raises(OSError, match=r"space|large"):
        Scratch(100, tmp_path).zeros((1 << 56,), np.int8)


def test_a_catalogue_is_encoded_in_parts_as_at_once(finished, tmp_path, monkeypatch):
    run = open_run(finished)
    model = TrainStage(run, "per_layer").best_model()
    whole = Encoder(model, run.prompts, run.sources, 16).items()
    monkeypatch.setattr("rarec.models.encode.ITEMS_AT_A_TIME", 7)
    parts = Encoder(model, run.prompts, run.sources, 16, scratch=Scratch(100, tmp_path)).items()
    assert isinstance(parts.base, np.memmap)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)
    rows = np.arange(19)[::-2]
    some = Encoder(model, run.prompts, run.sources, 16, scratch=Scratch(100, tmp_path)).items(rows)
    np.testing.assert_allclose(some, whole[rows], rtol=1e-4, atol=1e-6)


def test_states_of_the_catalogue_are_computed_in_parts_as_at_once(finished, monkeypatch):
    run = open_run(finished, ["run.memory_gb=1e-9"])
    stored = np.load(run.directory("shards") / "item_states.npy")
    monkeypatch.setattr("rarec.stages.shard_content.STATES_AT_A_TIME", 7)
    states = ShardContent(run).sidecars["item_states.npy"]()
    assert states.dtype == stored.dtype
    np.testing.assert_allclose(states, stored, rtol=1e-2, atol=1e-3)
