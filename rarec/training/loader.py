"""Batches for the training loop, read and collated ahead by worker processes.

The main process iterates over the plan and hands out sample numbers; batches come back in the same order with any
number of workers.

Shape letters: b samples of this rank, H history, L stored blocks, D hidden size, N catalogue.
"""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from rarec.data.shards.batch_plan import Numbers
from rarec.data.shards.samples import Sample
from rarec.data.shards.stream import SampleStream
from rarec.distributed.signals import SIGNALS
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ids.source import Source
from rarec.models.encode import Vectors, side_batch, title_vectors
from rarec.models.losses import LossTargets
from rarec.models.towers import RaRec, SideBatch
from rarec.prompts import PromptPair

_ITEMS_CACHED = 65_536
CRCS = 2**32
"""Number of CRC-32 checksums."""
_WORKER_DIED = "DataLoader worker (pid"
"""Beginning of PyTorch's messages about a dead worker."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Batch:
    """The input of one rank to a step, or to a part of a step.

    Attributes:
        users: prompts, slot positions and source vectors of the users.
        items: those of their target items.
        targets: further inputs of the losses.
        keys: keys of the samples, for messages.
        tokens: text and slots of both sides, without padding.
    """

    users: SideBatch
    items: SideBatch
    targets: LossTargets
    keys: tuple[str, ...]
    tokens: int

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on another device."""
        return Batch(self.users.to(device), self.items.to(device), self.targets.to(device), self.keys, self.tokens)


class Collator:
    """Collates samples to batches for one model.

    Args:
        model: says how many slots its towers take.
        prompts: fills the item prompts; the most recent ones are cached.
        sources: every source by name; a batch's rows are gathered here, so that tables need no memory on the device.
        item_states_NLD: stored text-only states of the catalogue, memory-mapped.
        id_dropout: share of the samples whose item's vectors are replaced by zeros. It depends on a sample's key alone
            whether it is one of them.
    """

    def __init__(
        self,
        model: RaRec,
        prompts: PromptPair,
        sources: Mapping[str, Source],
        item_states_NLD: npt.NDArray[np.floating],
        id_dropout: float,
    ) -> None:
        self.model, self.prompts, self.sources, self.item_states_NLD = model, prompts, sources, item_states_NLD
        self.id_dropout = id_dropout
        self._item = lru_cache(_ITEMS_CACHED)(prompts.item)

    def __call__(self, samples: Sequence[Sample], total: int) -> Batch:
        """Return a batch of this rank's samples, out of `total` on all ranks."""
        rows = np.array([sample.target for sample in samples])
        user_states_bLD = _stacked([sample.states_LD for sample in samples])
        item_states_bLD = _stacked(list(self.item_states_NLD[rows]))
        users = self._users(samples)
        items = self._items(rows, np.array([crc32(sample.key.encode()) for sample in samples]) / CRCS)
        targets = LossTargets(
            torch.tensor([sample.user for sample in samples]),
            torch.from_numpy(rows),
            _padded([sample.history_H for sample in samples]),
            user_states_bLD,
            item_states_bLD,
            total,
        )
        tokens = int(users.mask_BT.sum() + items.mask_BT.sum())
        return Batch(users, items, targets, tuple(sample.key for sample in samples), tokens)

    def _users(self, samples: Sequence[Sample]) -> SideBatch:
        prompts = [self.prompts.stored(sample.tokens_T, sample.marks, sample.history_H) for sample in samples]
        vectors: Vectors = {name: np.stack([sample.vectors[name] for sample in samples]) for name in self.sources}
        vectors = {**vectors, **title_vectors(prompts, self.prompts, self.sources)}
        return side_batch(prompts, vectors, self.model.user, self.prompts.tokenizer.filler)

    def _items(self, rows: npt.NDArray[np.int64], draws_b: npt.NDArray[np.float64]) -> SideBatch:
        kept_b11 = (draws_b >= self.id_dropout)[:, None, None]
        vectors = {name: source.items_NE[rows][:, None] * kept_b11 for name, source in self.sources.items()}
        prompts = [self._item(row) for row in rows.tolist()]
        return side_batch(prompts, vectors, self.model.item, self.prompts.tokenizer.filler)


@dataclass(frozen=True)
class RankShare:
    """One rank's share of a batch.

    Attributes:
        numbers: sample numbers of this rank.
        total: number of samples on all ranks.
    """

    numbers: Numbers
    total: int


class BatchLoader:
    """Opens the batches of a training at any step.

    Args:
        stream: reads samples by number.
        collate: turns samples into a batch.
        workers: number of worker processes; with 0, a batch is read when it is asked for.
        world: the ranks that share each batch.
        parts: number of parts that a step's batch is split into, processed one after the other.
    """

    def __init__(
        self, stream: SampleStream, collate: Collator, workers: int, world: World = SINGLE, parts: int = 1
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


class _Batches(Dataset[Batch | bytes | Exception]):
    """Reads and collates the samples of a share, in a worker."""

    def __init__(self, stream: SampleStream, collate: Collator) -> None:
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


def _stacked(states: list[npt.NDArray[np.floating]]) -> torch.Tensor:
    """Stack b arrays (L, D) to (b, L, D) in float32."""
    return torch.from_numpy(np.stack(states).astype(np.float32))


def _padded(histories: list[npt.NDArray[np.int32]]) -> torch.Tensor:
    """Pad histories with -1 to (b, H)."""
    result = np.full((len(histories), max(map(len, histories))), -1, np.int64)
    for row, history in enumerate(histories):
        result[row, : len(history)] = history
    return torch.from_numpy(result)
