"""Read samples from the tars by number, and load the batches of a training, ahead in worker processes.

The main process iterates over the plan and hands out sample numbers; batches come back in the same order with any
number of workers. No tar is read completely, or opened before it is needed: to start in the middle of an epoch costs
as much as to start at its beginning, and a rank reads only its own samples.

Shape letters: S samples, n samples of a batch.
"""

import ctypes
import os
import signal
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rarec.data.shards.batch_plan import BatchPlan, Numbers
from rarec.data.shards.files import MAX_OPEN, Tars
from rarec.data.shards.samples import REPAIR, IndexRows, Sample, key_of, read_sample
from rarec.data.tables import release_pages
from rarec.distributed.signals import SIGNALS
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError

_WORKER_DIED = "DataLoader worker (pid"
"""Beginning of PyTorch's messages about a dead worker."""
_PR_SET_PDEATHSIG = 1

B = TypeVar("B")
_Share = tuple[Numbers, int]
"""One rank's share of a batch: its sample numbers, and the number of samples on all ranks."""


class ShardDataset(Dataset[Sample]):
    """The samples of some shards by number, each checked against the index.

    Args:
        index_S: location of each sample, from `open_index`.
        tars: the tars.
    """

    def __init__(self, index_S: IndexRows, tars: Tars) -> None:
        self.index_S, self.tars = index_S, tars
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index_S)

    def __getitem__(self, number: int) -> Sample:
        """Return a sample.

        Raises:
            UserError: it does not match the index; the message names its shard and key.
        """
        row = self.index_S[number]
        shard = int(row["shard"])
        name = self.tars.name(shard)
        try:
            return read_sample(self._extent(row), row, name)
        except UserError:
            self._close(shard)
            if not self.tars.drop_cached(shard):
                raise
        return read_sample(self._extent(row), row, name)

    def read(self, numbers_n: Numbers) -> list[Sample]:
        """Return the samples with these numbers; see `__getitem__`."""
        samples = [self[number] for number in numbers_n.tolist()]
        release_pages(self.index_S)
        return samples

    def _extent(self, row: np.void) -> bytes:
        """Return the bytes at a sample's place; fewer if the tar ends earlier."""
        shard = int(row["shard"])
        if shard not in self._open:
            self._open[shard] = self.tars.open(shard)
            if len(self._open) > MAX_OPEN:
                self._close(next(iter(self._open)))
        self._open.move_to_end(shard)
        try:
            return os.pread(self._open[shard].fileno(), int(row["size"]), int(row["offset"]))
        except OSError as error:  # a bad sector
            raise UserError(f"shard {self.tars.name(shard)}, sample {key_of(row)}: {error}", REPAIR) from None

    def _close(self, shard: int) -> None:
        if shard in self._open:
            self._open.pop(shard).close()


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
        self._pending = deque[Numbers]()

    @property
    def next_samples(self) -> str:
        """The first numbers of the next batch's samples, as text; empty if none has been requested."""
        return f"{', '.join(map(str, self._pending[0][:3]))}, ..." if self._pending else ""

    @contextmanager
    def open(self, first: int, last: int) -> Iterator[Iterator[B]]:
        """Yield an iterator over this rank's batches of steps `first` to `last` - 1, part by part.

        Workers end with the context.

        Raises:
            UserError: any error that a worker met; or a worker died, which is raised wherever the main process is.
        """
        self._pending.clear()
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
                self._pending.append(numbers)
                yield numbers, len(whole)

    def _receive(self, batch: B | bytes | Exception) -> B:
        self._pending.popleft()
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


def _kill(workers: Collection[BaseProcess]) -> None:
    """End workers, which do not react to SIGTERM."""
    for worker in workers:
        worker.kill()
    for worker in workers:
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
