"""Worker processes: the same batches for any number of them, errors as they were raised, none left running."""

import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.resource_sharer import DupFd
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rarec.data.shards.loader import BatchLoader, copied_ahead
from rarec.distributed.world import World
from rarec.errors import UserError
from tests.processes import all_end, workers_of
from tests.shards import open_stream, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("shards")
    return directory, write_shards(directory, [11, 5, 17, 9, 8, 12])


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert workers_of(psutil.Process()) == []


def keys(samples, total: int = 0) -> list[int]:
    """Return the users of the samples, in place of a batch."""
    return [sample.user for sample in samples]


def loader(shards, workers: int, collate=keys, rank: int = 0, world: int = 1, **plan) -> BatchLoader:
    stream = open_stream(*shards, **plan)
    return BatchLoader(stream.plan, stream.samples, collate, workers, World(rank, world))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    workers=st.integers(1, 2),
    ranks=st.integers(1, 2),
    cut=st.sampled_from([{"batch_size": 7}, {"tokens_per_batch": 90}]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_batches_are_those_of_the_plan_over_all_epochs_for_any_number_of_workers(
    shards, workers, ranks, cut, seed, data
):
    plan = open_stream(*shards, seed=seed, **cut).plan
    whole = [batch.tolist() for epoch in range(3) for batch in plan.batches(epoch)]
    first = data.draw(st.integers(0, len(whole) - 1))
    last = data.draw(st.integers(first, len(whole)))
    for rank in range(ranks):
        expected = [batch[rank::ranks] for batch in whole[first:last]]
        for count in (0, workers):
            with loader(shards, count, rank=rank, world=ranks, seed=seed, **cut).open(first, last) as batches:
                assert list(batches) == expected


def fails_on(number: int, error: Exception):
    def collate(samples, total) -> list[int]:
        if number in keys(samples):
            raise error
        return keys(samples)

    return collate


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_as_it_was_raised_after_the_batches_before_it(shards, workers):
    order = [batch.tolist() for batch in open_stream(*shards).plan.batches(0)]
    opened = loader(shards, workers, fails_on(order[3][0], UserError("this is wrong", "do that"))).open(0, len(order))
    seen = []

    def train() -> None:
        with opened as batches:
            for batch in batches:
                seen.append(batch)

    with pytest.raises(UserError) as error:
        train()
    assert seen == order[:3]
    assert (error.value.problem, error.value.remedy) == ("this is wrong", "do that")
    assert "Traceback" not in str(error.value)
    full = OSError(28, "No space left on device", "cache/000001.tar")
    with pytest.raises(OSError, match="No space left") as trouble, loader(shards, 1, fails_on(0, full)).open(0, 9) as b:
        list(b)
    assert trouble.value.filename == "cache/000001.tar"


def test_a_damaged_sample_read_by_a_worker_is_named(tmp_path):
    manifest = write_shards(tmp_path, [20])
    os.truncate(tmp_path / "000000.tar", 512 * 20)
    with pytest.raises(UserError, match=r"000000\.tar, sample \d+-"), loader((tmp_path, manifest), 1).open(0, 3) as b:
        list(b)


def test_a_batch_of_many_tensors_needs_no_files(shards):
    def collate(samples, total) -> list[torch.Tensor]:
        most = len(list(Path("/proc/self/fd").iterdir())) + 2
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))  # in the worker
        return [torch.full((2, 3), number) for number in range(20)]

    with loader(shards, 1, collate).open(0, 3) as batches:
        for tensors in batches:
            assert all(torch.equal(tensor, torch.full((2, 3), number)) for number, tensor in enumerate(tensors))
            tensors[0] += 1  # not read-only


def test_workers_end_where_no_more_can_be_started(shards, monkeypatch):
    started = []

    def start(queue) -> None:
        started.append(workers_of(psutil.Process()))
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(multiprocessing.queues.Queue, "_start_thread", start)
    with pytest.raises(RuntimeError, match="new thread"), loader(shards, 2).open(0, 3):
        pass
    assert len(started[0]) == 2
    assert workers_of(psutil.Process()) == []


def test_a_killed_worker_is_one_clear_error_wherever_the_main_process_is(shards):
    def slow(samples, total) -> list[int]:
        time.sleep(0.2)
        return keys(samples)

    def train(busy: bool) -> None:
        with loader(shards, 2, slow).open(0, 10) as batches:
            next(batches)
            os.kill(workers_of(psutil.Process())[0].pid, signal.SIGKILL)
            while busy:  # a step that takes its time
                time.sleep(0.01)
            list(batches)

    for busy in (True, False):
        started = time.monotonic()
        with pytest.raises(UserError, match="worker process") as error:
            train(busy)
        assert "train.stream.workers" in error.value.remedy
        assert time.monotonic() - started < 60  # no hang


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, RuntimeError, ZeroDivisionError])
def test_any_end_of_the_training_ends_the_workers(shards, error):
    children = []

    def train() -> None:
        with loader(shards, 2).open(0, 1000) as batches:
            next(batches)
            children.extend(workers_of(psutil.Process()))
            raise error("mine")

    with pytest.raises(error, match="mine"):
        train()
    assert len(children) == 2
    assert not any(child.is_running() for child in children)


def test_a_killed_main_process_takes_its_workers_along(shards):
    def main() -> None:
        with loader(shards, 2).open(0, 10**6) as batches:
            for _ in batches:
                time.sleep(0.1)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    main_process = psutil.Process(process.pid)
    deadline = time.monotonic() + 20
    while len(main_process.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = main_process.children()
    time.sleep(0.3)  # they are past their first lines
    process.kill()
    process.join()
    assert len(children) == 2
    assert all_end(children, seconds=10)


def test_nothing_to_do_starts_no_worker(shards):
    with loader(shards, 2).open(4, 4) as batches:
        assert workers_of(psutil.Process()) == []
        assert list(batches) == []


def test_planning_is_ahead_by_few_batches_only(shards):
    planned = []
    opened = loader(shards, 2)
    share = opened.plan.share
    opened.plan.share = lambda batch, rank, world: planned.append(1) or share(batch, rank, world)
    with opened.open(0, 10**9) as batches:
        for _ in range(5):
            next(batches)
        assert len(planned) <= 5 + 2 * 2


def test_taking_a_batch_may_be_stopped_half_way_with_no_word_of_it(shards, capfd):
    def collate(samples, total):
        return {"tokens": torch.ones(3), "door": DupFd(os.dup(2))._id[0]}

    with loader(shards, 1, collate, batch_size=7).open(0, 3) as batches:
        for batch in batches:
            with socket.socket(socket.AF_UNIX) as taker:
                taker.connect(batch["door"])  # and gone before the other side has said its first word
        time.sleep(0.2)
    assert capfd.readouterr().err == ""


class Moving:
    """A batch that notes where it is."""

    def __init__(self, number, device=None):
        self.number, self.device = number, device

    def to(self, device):
        return Moving(self.number, device)


def test_batches_that_are_copied_ahead_are_the_same_in_the_same_order():
    read, device = [], torch.device("cpu")  # PyTorch has streams that do nothing for it
    batches = (read.append(number) or Moving(number) for number in range(4))
    seen = []
    for batch in copied_ahead(batches, device):
        assert batch.device == device
        seen.append(batch.number)
        assert read == list(range(min(len(seen) + 1, 4)))
    assert seen == [0, 1, 2, 3]
    assert list(copied_ahead(iter(()), device)) == []
