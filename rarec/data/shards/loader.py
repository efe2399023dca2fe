"""The samples that a run trains on, and their batches, loaded ahead in worker processes.

The main process iterates over the plan and hands out sample numbers; batches come back in the same order with any
number of workers. No tar is read completely: to start in the middle of an epoch costs as much as to start at its
beginning, and a rank reads only its own samples.

Shape letters: S samples.
"""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rarec.config import RunConfig
from rarec.console.last_resort import SIGNALS
from rarec.data.shards.batch_plan import BatchPlan, Numbers, plan_batches
from rarec.data.shards.files import ShardDataset, tar_name
from rarec.data.shards.samples import IndexRows, Sample, key_of
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.storage.files import read_json, write_json

SKIPPED = "skipped.json"
"""In a variant's directory: the samples that its training leaves out, by shard and key."""
_NAMED = 3
"""Damaged samples that a line names."""
_WORKER_DIED = "DataLoader worker (pid"
"""Beginning of PyTorch's messages about a dead worker."""
_PR_SET_PDEATHSIG = 1

B = TypeVar("B")
_Share = tuple[Numbers, int]
"""One rank's share of a batch: its sample numbers, and the number of samples on all ranks."""


@dataclass(frozen=True)
class Feed:
    """The training samples of a run, for one variant after the other.

    Attributes:
        config: the run.
        manifest: manifest of the shards.
        samples: the samples by number.
        user_slots: most slots of a user prompt.
        say: prints one line to the user.
    """

    config: RunConfig
    manifest: dict[str, Any]
    samples: ShardDataset
    user_slots: int
    say: Callable[[str], None]

    def plan(self, excluded: Iterable[int] = ()) -> BatchPlan:
        """Return the plan of the batches, in the order that the seed gives, without some samples."""
        return plan_batches(self.samples.index_S, self.config, self.user_slots, excluded)

    def first_samples(self, plan: BatchPlan, count: int) -> Iterator[Sample]:
        """Read the first `count` samples of a training one by one, or all if there are fewer."""
        return (self.samples[number] for number in plan.first_samples(count).tolist())

    def exclusions(self, variant: Path, begun: bool, world: World) -> Numbers:
        """Return the samples that a variant leaves out: those on record, or before its first step, those damaged now.

        Every rank returns the same: rank 0 reads the record, and each shard is checked by one rank.

        Args:
            variant: directory of the variant.
            begun: whether its training has taken a step, as rank 0 sees it.
            world: the ranks that train.

        Raises:
            UserError: the record is malformed, or of other shards.
        """
        index_S, path = self.samples.index_S, variant / SKIPPED
        numbers: Numbers | list[int]
        if world.all_reduce_max(int(begun and world.is_main)):
            numbers = world.run_on_all(lambda: read_names(path, index_S) if world.is_main and path.exists() else [])
        elif self.config.train.stream.damaged == "refuse":
            return np.array([], np.int64)
        else:
            self.say(f"checking {len(index_S)} samples")
            shards = range(world.rank, int(index_S["shard"][-1]) + 1, world.size)
            numbers = world.run_on_all(lambda: self.samples.damaged(shards, os.cpu_count() or 1))
        left_out_S = np.zeros(len(index_S), np.uint8)
        left_out_S[numbers] = 1
        return np.flatnonzero(world.all_reduce_max_(left_out_S))

    def record(self, variant: Path, excluded: Numbers) -> None:
        """Report the samples that a variant leaves out, and write them to its directory, where a resume reads them."""
        path = variant / SKIPPED
        if len(excluded):
            write_json(path, name_samples(self.samples.index_S, excluded))
            named = name_samples(self.samples.index_S, excluded[:_NAMED])
            first = ", ".join(f"{file} {key}" for file, keys in named.items() for key in keys)
            self.say(f"left out {len(excluded)} damaged samples, such as {first}; {path} lists them")
        else:
            path.unlink(missing_ok=True)


def name_samples(index_S: IndexRows, numbers: Numbers) -> dict[str, dict[str, int]]:
    """Group sample numbers by file and key."""
    named: dict[str, dict[str, int]] = {}
    for number in numbers.tolist():
        named.setdefault(tar_name(int(index_S[number]["shard"])), {})[key_of(index_S[number])] = number
    return named


def read_names(path: Path, index_S: IndexRows) -> Numbers:
    """Read sample numbers from a file with the result of `name_samples`.

    Raises:
        UserError: the file is malformed, or does not match the index.
    """
    named = read_json(path)
    try:
        numbers = np.array(sorted(number for keys in named.values() for number in keys.values()), np.int64)
        matches = numbers.min(initial=0) >= 0 and name_samples(index_S, numbers) == named
    except (AttributeError, TypeError, ValueError, IndexError, OverflowError):
        matches = False
    if not matches:
        raise UserError(f"{path} names samples that are not in these shards", "retrain: rarec train CONFIG --fresh")
    return numbers


class BatchLoader(Generic[B]):
    """Loads the batches of a training from any step on.

    Args:
        plan: batches of sample numbers.
        samples: the samples by number.
        collate: turns this rank's samples into a batch, given the number of samples on all ranks.
        workers: number of worker processes; with 0, a batch is read when it is requested.
        world: the ranks that share each batch.
        parts: number of parts that a step's batch is split into, processed one after the other.
    """

    def __init__(
        self,
        plan: BatchPlan,
        samples: ShardDataset,
        collate: Callable[[Sequence[Sample], int], B],
        workers: int,
        world: World = SINGLE,
        parts: int = 1,
    ) -> None:
        self.plan, self.workers, self.world, self.parts = plan, workers, world, parts
        self._batches = _Batches(samples, collate)
        self._requested = deque[Numbers]()

    @property
    def next_samples(self) -> str:
        """The first numbers of the next batch's samples, as text; empty if none has been requested."""
        return f"{', '.join(map(str, self._requested[0][:3]))}, ..." if self._requested else ""

    @contextmanager
    def open(self, first: int, last: int) -> Iterator[Iterator[B]]:
        """Yield an iterator over this rank's batches of steps `first` to `last` - 1, part by part.

        Workers end with the context.

        Raises:
            UserError: any error that a worker met; or a worker died, which is raised wherever the main process is.
        """
        self._requested.clear()
        workers = self.workers if first < last else 0
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._shares(first, last),
            num_workers=workers,  # the same workers for all epochs
            multiprocessing_context="fork" if workers else None,  # they share what is loaded already
            worker_init_fn=partial(_prepare_worker, os.getpid()),
        )
        batches, others = None, set(active_children())
        try:
            batches = iter(loader)
            received, device = map(self._receive, batches), self.world.device
            yield copied_ahead(received, device) if device.type == "cuda" else received
        except RuntimeError as error:
            if _WORKER_DIED not in str(error):
                raise
            remedy = "free memory, or lower train.stream.workers; then run the same command to resume"
            raise UserError(f"a worker process that reads training data died: {error}", remedy) from None
        finally:
            if batches is None:  # a worker could not be started: end those that were
                _kill(set(active_children()) - others)
            elif workers:  # now, not at garbage collection, which waits while a traceback refers to the iterator
                batches._shutdown_workers()  # type: ignore[attr-defined]
                _kill(batches._workers)  # type: ignore[attr-defined]

    def _shares(self, first: int, last: int) -> Iterator[_Share]:
        """Yield this rank's share of each part of each step's batch."""
        for batch in self.plan.batches_between(first, last):
            for part in range(self.parts):
                whole = batch[part :: self.parts]
                numbers = self.plan.share(whole, self.world.rank, self.world.size)
                self._requested.append(numbers)
                yield numbers, len(whole)

    def _receive(self, batch: B | bytes | Exception) -> B:
        """Return what `_Batches` has read, or raise the error that it met."""
        self._requested.popleft()
        if isinstance(batch, Exception):
            raise batch
        received: B = _Pickler.loads(batch) if isinstance(batch, bytes) else batch
        return received


def copied_ahead(batches: Iterator[B], device: torch.device) -> Iterator[B]:
    """Yield batches on a GPU, which copies the next one while it computes with the present one."""
    streams: Any = torch.get_device_module(device)
    copies = streams.Stream()

    def copied() -> Any:
        batch: Any = next(batches, None)
        copies.wait_stream(streams.current_stream())  # memory that is used again is free by then
        with streams.stream(copies):
            return None if batch is None else batch.to(device)

    upcoming = copied()
    while upcoming is not None:
        streams.current_stream().wait_stream(copies)
        present, upcoming = upcoming, copied()
        yield present


class _Batches(Dataset[Any], Generic[B]):
    """Reads and collates the samples of a share, in a worker."""

    def __init__(self, samples: ShardDataset, collate: Callable[[Sequence[Sample], int], B]) -> None:
        self._samples, self._collate = samples, collate

    def __getitem__(self, share: _Share) -> B | bytes | Exception:
        try:
            batch = self._collate(self._samples.read(share[0]), share[1])
            return bytes(_Pickler.dumps(batch)) if get_worker_info() else batch
        except (UserError, OSError) as error:  # returned: if raised, its message would hold the worker's traceback
            return error


def _kill(workers: Iterable[BaseProcess]) -> None:
    """End workers, which do not react to SIGTERM."""
    for worker in workers:
        worker.kill()
        with suppress(RuntimeError):  # raised by PyTorch's handler of SIGCHLD
            worker.join()


def _prepare_worker(main: int, worker: int) -> None:
    """Leave signals to the main process, which ends its workers; if it is killed, Linux kills them too."""
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    # No traceback from here, such as of a MemoryError: the main process reports what happened.
    sys.stderr = None
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != main:  # it was killed before this line
        os._exit(1)


class _Pickler(ForkingPickler):
    """Pickle tensors by value, for the pipe from a worker to the process that forked it; nothing reaches a disk.

    PyTorch sends handles of shared memory instead, and hangs at the limit of open files.
    """

    def reducer_override(self, value: object) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented
