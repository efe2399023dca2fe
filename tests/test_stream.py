"""Test the stream: samples in the order of the plan, verified, and read only when needed."""

import os
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarec.config.schema import Train
from rarec.data.shards.files import MAX_OPEN, ShardDataset, Tars, open_index
from rarec.data.shards.loader import SKIPPED, Feed, name_samples, read_names
from rarec.data.shards.samples import key_of, write_tar
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.storage.files import write_json
from tests.shards import Stream, made_sample, open_stream, plan_of, users, write_shards

CUTS = st.one_of(
    st.fixed_dictionaries({"batch_size": st.integers(3, 20)}),
    st.fixed_dictionaries({"tokens_per_batch": st.integers(60, 200), "slots": st.integers(0, 2)}),
)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9), cut=CUTS, ranks=st.integers(1, 3), data=st.data())
def test_any_ranks_and_any_kill_point_give_the_same_epoch(tmp_path_factory, sizes, cut, ranks, data):
    directory, total = tmp_path_factory.mktemp("shards"), sum(sizes)
    manifest = write_shards(directory, sizes)
    excluded = data.draw(st.sets(st.integers(0, total - 1), max_size=total - 1))
    epoch, seed = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 99))

    def read(first: int, rank: int, world: int) -> list[list[int]]:
        stream = open_stream(directory, manifest, seed=seed, excluded=excluded, **cut)
        return users(stream.epoch(epoch, first, rank, world))

    whole = read(0, 0, 1)
    assert sorted(number for batch in whole for number in batch) == sorted(set(range(total)) - excluded)
    killed = data.draw(st.integers(0, len(whole)))
    parts = [read(0, rank, ranks)[:killed] for rank in range(ranks)]  # then one rank more goes on
    parts_after = [read(killed, rank, ranks + 1) for rank in range(ranks + 1)]
    together = [sorted(chain(*shares)) for half in (parts, parts_after) for shares in zip(*half, strict=True)]
    assert together == [sorted(batch) for batch in whole]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(2, 12), min_size=1, max_size=9), cuts=st.tuples(CUTS, CUTS), most=st.integers(1, 60))
def test_the_first_samples_do_not_depend_on_batches(tmp_path_factory, sizes, cuts, most):
    directory, total = tmp_path_factory.mktemp("shards"), sum(sizes)
    manifest = write_shards(directory, sizes)
    first, again = (open_stream(directory, manifest, excluded={0}, **cut).plan.first_samples(most) for cut in cuts)
    assert len(set(first)) == len(first) == min(most, total - 1)
    assert list(first) == list(again)
    assert 0 not in first


def test_a_sample_comes_back_as_it_was(tmp_path):
    manifest = write_shards(tmp_path, [4, 3])
    back = {sample.user: sample for batch in open_stream(tmp_path, manifest).epoch(0) for sample in batch}
    for number, sample in back.items():
        for name, value in vars(made_sample(number)).items():
            if name == "vectors":
                np.testing.assert_array_equal(sample.vectors["id"], value["id"])
            else:
                np.testing.assert_array_equal(getattr(sample, name), value)
        assert sample.states_LD.dtype == np.float16


class Counted(Tars):
    """Tars that record which of them were opened, with the open files."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.opened: dict[int, list] = {}

    def open(self, shard: int):
        file = super().open(shard)
        self.opened.setdefault(shard, []).append(file)
        return file

    @property
    def held(self) -> int:
        return sum(not file.closed for files in self.opened.values() for file in files)


def test_beginning_in_the_middle_of_a_thousand_shards_opens_those_of_the_batch(tmp_path):
    shards, each = 1000, 4
    record, rows = write_tar(tmp_path / "000000.tar", map(made_sample, range(each)), 0)
    index_S = np.tile(rows, shards)
    index_S["shard"] = np.repeat(np.arange(shards), each)
    for shard in range(1, shards):
        (tmp_path / f"{shard:06d}.tar").symlink_to("000000.tar")
    tars = Counted(tmp_path)
    plan = plan_of(index_S["shard"], index_S["tokens"], 0, batch_size=16)
    batch = next(plan.batches(1, 120))
    stream = Stream(plan, ShardDataset(index_S, tars))
    next(stream.epoch(1, 120))
    assert sorted(tars.opened) == sorted(set(index_S["shard"][batch].tolist()))
    for _ in stream.epoch(1, 121):
        assert tars.held <= MAX_OPEN
    assert record["samples"] == each


def test_a_rank_reads_its_own_samples_only(tmp_path):
    manifest = write_shards(tmp_path, [30])
    stream = open_stream(tmp_path, manifest)
    batch = next(stream.plan.batches(0))
    damaged = int(batch[1])
    with (tmp_path / "000000.tar").open("r+b") as file:
        file.seek(int(open_index(tmp_path, manifest)[damaged]["offset"]) + 600)
        file.write(b"\xff\x00\xff")
    assert [s.user for s in next(stream.epoch(0, 0, rank=0, world=2))] == batch[0::2].tolist()
    with pytest.raises(UserError, match=f"sample {damaged:09d}-"):
        next(stream.epoch(0, 0, rank=1, world=2))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-12_000] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 512 * 3])


def fold(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (flip, "sample 0000000[01][0-9]-00000[0-9]: "),
        (cut, "sample 0000000[01][0-9]-00000[0-9]: "),
        (lambda path: path.write_bytes(b""), "sample 0000000[01][0-9]-00000[0-9]: "),
        (lambda path: shutil.copy(path.with_name("000000.tar"), path), "sample 0000000[01][0-9]-00000[0-9]: "),
        (Path.unlink, "cannot be read: No such file"),
        (fold, "cannot be read"),
    ],
)
def test_a_harmed_shard_is_refused_by_name(tmp_path, harm, what):
    manifest = write_shards(tmp_path, [9, 10])
    harm(tmp_path / "000001.tar")
    with pytest.raises(UserError, match=rf"shard \S+/000001\.tar,? {what}") as error:
        users(open_stream(tmp_path, manifest).epoch(0))
    assert "--verify --repair" in error.value.remedy


def test_damage_is_found_sample_by_sample_and_the_rest_trains_on(tmp_path):
    manifest = write_shards(tmp_path, [10, 10, 10, 10])
    index_S = open_index(tmp_path, manifest)

    def damaged_samples() -> list[int]:
        return ShardDataset(index_S, Tars(tmp_path)).damaged(range(4), 2)

    assert damaged_samples() == []
    (tmp_path / "000001.tar").unlink()
    for number in (23, 27):
        with (tmp_path / "000002.tar").open("r+b") as file:
            file.seek(int(index_S[number]["offset"]) + 700)
            file.write(b"\xaa\x55")
    os.truncate(tmp_path / "000003.tar", int(index_S[38]["offset"]) + 512)
    damaged = damaged_samples()
    assert damaged == [*range(10, 20), 23, 27, 38, 39]
    stream = open_stream(tmp_path, manifest, excluded=damaged)
    assert sorted(chain(*users(stream.epoch(0)))) == sorted(set(range(40)) - set(damaged))


def test_shards_are_checked_in_parallel(tmp_path):
    index_S, both = open_index(tmp_path, write_shards(tmp_path, [3, 3])), Barrier(2)

    class Meeting(Tars):
        def open(self, shard: int):
            both.wait(timeout=30)  # the other shard is opened at the same time
            return super().open(shard)

    assert ShardDataset(index_S, Meeting(tmp_path)).damaged(range(2), 2) == []


class ThreadRank(World):
    """A rank that is a thread: what ranks exchange is in a list that they share."""

    def among(self, ranks: Barrier, values: list) -> "ThreadRank":
        self.__dict__.update(ranks=ranks, values=values)
        return self

    def exchange(self, own):
        self.values[self.rank] = own
        self.ranks.wait(timeout=30)
        values = list(self.values)
        self.ranks.wait(timeout=30)
        return values

    def all_reduce_max_(self, array):
        array[...] = np.max(self.exchange(array.copy()), axis=0)
        return array


@pytest.mark.parametrize("begun", [False, True])
def test_ranks_agree_on_damaged_samples_though_each_sees_other_files(tmp_path, begun):
    config = SimpleNamespace(train=Train.model_validate({"stream": {"damaged": "skip"}}))
    ranks, values, opened = Barrier(2), [None, None], []

    def excluded(rank: int) -> list[int]:
        directory = tmp_path / str(rank)
        manifest = write_shards(directory, [3, 3, 3])
        tars = Counted(directory)
        os.truncate(directory / "000001.tar", 0)
        if rank == 0:  # the record of a training that has begun, and damage that rank 1 does not see
            write_json(directory / SKIPPED, name_samples(open_index(directory, manifest), np.array([4])))
            (directory / "000002.tar").write_bytes(b"")
        feed = Feed(config, manifest, ShardDataset(open_index(directory, manifest), tars), 0, lambda line: None)
        world = ThreadRank(rank, 2).among(ranks, values)
        numbers = feed.exclusions(directory, begun and rank == 0, world)
        opened.extend(tars.opened)
        return numbers.tolist()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(excluded, range(2))
    assert first == second == ([4] if begun else [3, 4, 5, 6, 7, 8])
    assert sorted(opened) == ([] if begun else [0, 1, 2])  # each is checked by one rank


def test_damaged_samples_are_named_on_record_and_a_garbled_record_is_refused(tmp_path):
    index_S = open_index(tmp_path, write_shards(tmp_path, [3, 3]))
    named = name_samples(index_S, np.array([1, 4]))
    assert named == {"000000.tar": {key_of(index_S[1]): 1}, "000001.tar": {key_of(index_S[4]): 4}}
    path = tmp_path / "skipped.json"
    write_json(path, named)
    assert read_names(path, index_S).tolist() == [1, 4]
    last = {"000001.tar": {key_of(index_S[5]): -1}}
    for garbled in ([], {"000000.tar": []}, {"000000.tar": {"x": 1}}, {"000000.tar": {key_of(index_S[1]): 99}}, last):
        write_json(path, garbled)
        with pytest.raises(UserError, match=r"skipped\.json"):
            read_names(path, index_S)


def test_memory_is_flat_over_an_epoch_of_many_shards(tmp_path):
    directory, states_LD = tmp_path, np.ones((8, 2048), np.float16)
    rows, shards, each = [], 40, 25
    for shard in range(shards):
        samples = (made_sample(number, states_LD=states_LD) for number in range(shard * each, (shard + 1) * each))
        rows.append(write_tar(directory / f"{shard:06d}.tar", samples, shard)[1])
    index_S = np.concatenate(rows)
    plan = plan_of(index_S["shard"], index_S["tokens"], 0, batch_size=64)
    stream = Stream(plan, ShardDataset(index_S, Tars(directory)))
    tracemalloc.start()  # the resident size of a process that ran other tests says less
    sizes = [tracemalloc.get_traced_memory()[0] for _ in stream.epoch(0)]
    tracemalloc.stop()
    assert sum(int(row["size"].sum()) for row in rows) > 30e6
    early, late = (np.median(part) for part in (sizes[2:7], sizes[-5:]))  # of each: threads of other tests allocate too
    assert late - early < 3e5  # ten samples
