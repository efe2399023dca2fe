"""The stream: every sample once an epoch, order = f(seed, epoch), resume at any step, shards that cannot lie."""

import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarec.data.samples import Sample, read_shard, write_shard
from rarec.data.shards import write_shards
from rarec.data.stream import SampleStream, ShardPlan, prefetch
from rarec.errors import UserError


def sample(number: int) -> Sample:
    history = np.arange(number % 5 + 1, dtype=np.int32)
    tokens = np.arange(7 + number % 11, dtype=np.int32)
    return Sample(
        user=number,
        position=len(history),
        target=number % 13,
        history_H=history,
        tokens_T=tokens,
        marks={"id": 1},
        states_LD=np.full((2, 4), number, np.float16),
        vectors={"id": np.full((1, 3), number, np.float32)},
    )


def shards(directory: Path, total: int, per_shard: int) -> list[dict]:
    return write_shards(directory, total, per_shard, lambda rows: map(sample, rows), "identity", lambda line: None)


def records(sizes: list[int]) -> list[dict]:
    return [{"samples": size, "lengths": [(size * 7 + at) % 19 for at in range(size)]} for size in sizes]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    batch=st.integers(2, 50),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 5),
)
def test_an_epoch_visits_every_sample_once_in_batches_of_even_size(sizes, batch, seed, epoch):
    plan = ShardPlan(records(sizes), batch, seed)
    batches = plan.batches(epoch)
    seen = sorted((int(shard), int(place)) for part in batches for shard, place in part)
    assert seen == [(shard, place) for shard, size in enumerate(sizes) for place in range(size)]
    assert len(batches) == plan.steps == -(-sum(sizes) // batch)
    assert max(map(len, batches)) <= batch
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[list[int]]:
        return np.concatenate(ShardPlan(records([30, 30, 30]), 8, seed).batches(epoch)).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_batches_hold_prompts_of_like_length():
    plan = ShardPlan(records([200]), 10, 0)
    lengths = np.array(plan.records[0]["lengths"])
    spread = np.mean([np.ptp(lengths[batch[:, 1]]) for batch in plan.batches(0)])
    assert spread < 0.3 * np.ptp(lengths)


@settings(max_examples=15, deadline=None)
@given(per_shard=st.integers(3, 20), batch=st.integers(2, 9), first=st.integers(0, 10))
def test_an_epoch_goes_on_from_any_step(tmp_path_factory, per_shard, batch, first):
    directory = tmp_path_factory.mktemp("shards")
    plan = ShardPlan(shards(directory, 40, per_shard), batch, seed=3)
    whole = [[s.key for s in part] for part in SampleStream(directory, plan).epoch(2)]
    rest = [[s.key for s in part] for part in SampleStream(directory, plan).epoch(2, first)]
    assert rest == whole[first:]


def test_a_sample_comes_back_as_it_was(tmp_path):
    record = write_shard(tmp_path / "a.tar", [sample(5), sample(6)])
    back = read_shard(tmp_path / "a.tar", record)[1]
    for field, value in vars(sample(6)).items():
        if field == "vectors":
            np.testing.assert_array_equal(back.vectors["id"], value["id"])
        else:
            np.testing.assert_array_equal(getattr(back, field), value)
    assert back.states_LD.dtype == np.float16


def test_equal_samples_make_equal_bytes(tmp_path):
    first = write_shard(tmp_path / "a.tar", map(sample, range(5)))
    time.sleep(1.1)
    assert write_shard(tmp_path / "b.tar", map(sample, range(5)))["sha256"] == first["sha256"]


def test_a_killed_writer_goes_on_where_it_stopped(tmp_path):
    made: list[int] = []

    def make(rows: range):
        for number in rows:
            if number == 25 and len(made) == 25:
                raise KeyboardInterrupt
            made.append(number)
            yield sample(number)

    def write() -> list[dict]:
        return write_shards(tmp_path, 40, 10, make, "identity", lambda line: None)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["000000.tar", "000001.tar"]
    after = write()
    assert made == [*range(25), *range(20, 40)]
    assert [r["sha256"] for r in after] == [r["sha256"] for r in shards(tmp_path / "undisturbed", 40, 10)]


def test_shards_of_another_identity_are_written_again(tmp_path):
    shards(tmp_path, 10, 10)
    told: list[str] = []
    write_shards(tmp_path, 10, 10, lambda rows: map(sample, rows), "other", told.append)
    assert len(told) == 1


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5120])


@pytest.mark.parametrize("harm", [_flip, _cut, Path.unlink])
def test_a_harmed_shard_is_refused_by_name(tmp_path, harm):
    record = write_shard(tmp_path / "a.tar", map(sample, range(5)))
    harm(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar"):
        read_shard(tmp_path / "a.tar", record)


def test_a_shard_without_a_field_names_the_sample(tmp_path):
    record = write_shard(tmp_path / "a.tar", map(sample, range(3)))
    with tarfile.open(tmp_path / "a.tar") as old, tarfile.open(tmp_path / "b.tar", "w") as new:
        for member in old:
            if member.name != "000000001-000002.tokens.npy":
                new.addfile(member, old.extractfile(member))
    from rarec.artefacts import sha256_file

    with pytest.raises(UserError, match=r"b\.tar, sample 1: KeyError 'tokens'"):
        read_shard(tmp_path / "b.tar", {**record, "sha256": sha256_file(tmp_path / "b.tar")})


def test_prefetch_keeps_the_order_and_raises_what_was_raised():
    assert list(prefetch(range(50))) == list(range(50))

    def broken():
        yield 1
        raise UserError("shard x")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(UserError, match="shard x"):
        next(items)


def test_leaving_a_prefetch_early_ends_its_thread():
    import threading

    before = threading.active_count()
    items = prefetch(iter(range(10**9)))
    next(items)
    items.close()
    assert threading.active_count() == before
