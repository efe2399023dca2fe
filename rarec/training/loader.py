"""Batches for the training loop, read and collated ahead by worker processes.

The main process iterates over the plan and hands out sample numbers; batches come back in the same order with any
number of workers.
"""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rarec.data.shards.batch_plan import Numbers
from rarec.data.shards.samples import Sample
from rarec.data.shards.stream import SampleStream
from rarec.distributed.signals import SIGNALS
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError

_WORKER_DIED = "DataLoader worker (pid"
"""Beginning of PyTorch's messages about a dead worker."""
_PR_SET_PDEATHSIG = 1


class Movable(Protocol):
    """Something that can be copied to a device."""

    def to(self, device: torch.device) -> Self:
        """Return the same on another device."""


Batch = TypeVar("Batch", bound=Movable)
Collate = Callable[[Sequence[Sample], int], Batch]
"""Turns this rank's samples, out of a number on all ranks, into a batch."""


@dataclass(frozen=True)
class RankShare:
    """One rank's share of a batch.

    Attributes:
        numbers: sample numbers of this rank.
        total: number of samples on all ranks.
    """

    numbers: Numbers
    total: int


class BatchLoader(Generic[Batch]):
    """Opens the batches of a training at any step.

    Args:
        stream: reads samples by number.
        collate: turns samples into a batch.
        workers: number of worker processes; with 0, a batch is read when it is asked for.
        world: the ranks that share each batch.
        parts: number of parts that a step's batch is split into, processed one after the other.
    """

    def __init__(
        self, stream: SampleStream, collate: Collate[Batch], workers: int, world: World = SINGLE, parts: int = 1
    ) -> None:
        self.plan, self.workers, self.world, self.parts = stream.plan, workers, world, parts
        self._dataset, self._pending = _Batches(stream, collate), deque[Numbers]()

    @property
    def next_samples(self) -> str:
        """The first numbers of the next batch's samples, as text; empty if none has been requested."""
        return f"{', '.join(map(str, self._pending[0][:3]))}, ..." if self._pending else ""

    @contextmanager
    def open(self, first: int, last: int) -> Iterator[Iterator[Batch]]:
        """Yield an iterator over this rank's batches of steps `first` to `last` - 1, part by part.

        Workers end with the context.

        Raises:
            UserError: any error that a worker met; or a worker died, which is raised wherever the main process is.
        """
        self._pending.clear()
        shares = (share for batch in self.plan.batches_between(first, last) for share in self._shares(batch))
        workers = self.workers if first < last else 0
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=shares,
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

    def _shares(self, batch: Numbers) -> Iterator[RankShare]:
        """Yield this rank's share of each part of the batch."""
        for part in (batch[at :: self.parts] for at in range(self.parts)):
            numbers = self.plan.share(part, self.world.rank, self.world.size)
            self._pending.append(numbers)
            yield RankShare(numbers, len(part))

    def _receive(self, made: Batch | bytes | Exception) -> Batch:
        self._pending.popleft()
        if isinstance(made, Exception):
            raise made
        batch: Batch = _Pickler.loads(made) if isinstance(made, bytes) else made
        return batch


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on a GPU, which copies the next one while it computes with the present one."""
    streams = torch.get_device_module(device)
    copies = streams.Stream()

    def copied() -> Batch | None:
        batch = next(batches, None)
        copies.wait_stream(streams.current_stream())  # memory that is used again is free by then
        with streams.stream(copies):
            return None if batch is None else batch.to(device)

    upcoming = copied()
    while upcoming is not None:
        streams.current_stream().wait_stream(copies)
        present, upcoming = upcoming, copied()
        yield present


class _Batches(Dataset[Batch | bytes | Exception], Generic[Batch]):
    """Reads and collates the samples of a share, in a worker."""

    def __init__(self, stream: SampleStream, collate: Collate[Batch]) -> None:
        self._stream, self._collate = stream, collate

    def __getitem__(self, share: RankShare) -> Batch | bytes | Exception:
        try:
            made = self._collate(self._stream.read(share.numbers), share.total)
            return bytes(_Pickler.dumps(made)) if get_worker_info() else made
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

    def reducer_override(self, made: object) -> Any:
        return (torch.from_numpy, (made.numpy(),)) if isinstance(made, torch.Tensor) else NotImplemented
