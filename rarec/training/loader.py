"""Batches for the training loop, read and collated ahead by worker processes.

The main process walks the plan and hands out sample numbers; what comes back comes in their order, whatever the number
of workers.
"""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler

from torch.utils.data import DataLoader, Dataset, get_worker_info

from rarec.data.shards.batch_plan import Numbers
from rarec.data.shards.stream import SampleStream
from rarec.errors import UserError
from rarec.training.batches import Batch, Collator
from rarec.training.stopping import SIGNALS
from rarec.world import SINGLE, World

_DEAD = "DataLoader worker (pid"
"""So begin PyTorch's messages of a dead worker."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Share:
    """Sample numbers of this rank, and how many samples all ranks have together."""

    numbers: Numbers
    total: int


class BatchLoader:
    """Opens the batches of a training at any step.

    Args:
        stream: reads samples by number.
        collate: samples to a batch.
        workers: processes; with 0, a batch is read when it is asked for.
        world: that share each batch.
        parts: into which a step's batch is cut, one after the other.
    """

    def __init__(
        self, stream: SampleStream, collate: Collator, workers: int, world: World = SINGLE, parts: int = 1
    ) -> None:
        self.plan, self.workers, self.world, self.parts = stream.plan, workers, world, parts
        self._work, self._due = _Work(stream, collate), deque[Numbers]()

    @property
    def due(self) -> str:
        """The first numbers of the samples that come next, where they have been asked for."""
        return f"{', '.join(map(str, self._due[0][:3]))}, ..." if self._due else ""

    @contextmanager
    def open(self, first: int, last: int) -> Iterator[Iterator[Batch]]:
        """This rank's shares of steps `first` to `last`, the last not included, part by part. On leaving, workers end.

        Raises:
            UserError: whatever a worker met, just as it met it; or a worker died, which may interrupt anything.
        """
        self._due.clear()
        shares = (share for batch in self.plan.batches_between(first, last) for share in self._shares(batch))
        workers = self.workers if first < last else 0
        batches = iter(
            DataLoader(
                self._work,
                batch_size=None,
                sampler=shares,
                num_workers=workers,  # one set of them for all epochs
                multiprocessing_context="fork" if workers else None,  # they share what is loaded; nothing is packed
                worker_init_fn=partial(_belong_to, os.getpid()),
            )
        )
        try:
            yield map(self._come, batches)
        except RuntimeError as error:
            if _DEAD not in str(error):
                raise
            remedy = "free memory (or /dev/shm), or lower train.stream.workers; the same command goes on from here"
            raise UserError(f"a process that reads training data died: {error}", remedy) from None
        finally:
            if workers:  # not left to the garbage collector, which a traceback would keep waiting
                batches._shutdown_workers()  # type: ignore[attr-defined]
                for worker in batches._workers:  # type: ignore[attr-defined]
                    worker.kill()  # one that hangs: it heeds no SIGTERM

    def _shares(self, batch: Numbers) -> Iterator[Share]:
        """This rank's share of each of the batch's parts."""
        for part in (batch[at :: self.parts] for at in range(self.parts)):
            numbers = self.plan.share(part, self.world.rank, self.world.size)
            self._due.append(numbers)
            yield Share(numbers, len(part))

    def _come(self, made: Batch | bytes | Exception) -> Batch:
        self._due.popleft()
        return _good(made)


def _belong_to(main: int, worker: int) -> None:
    """Signals are for the main process alone, which ends its workers; where it is killed, Linux kills them too."""
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    # Only the thread that hands over shared memory gets here, when the main process is stopped while it takes some.
    sys.excepthook = lambda *_: None
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != main:  # it was killed before this line
        os._exit(1)


class _Work(Dataset[Batch | bytes | Exception]):
    """What workers do with the sample numbers of a batch."""

    def __init__(self, stream: SampleStream, collate: Collator) -> None:
        self._stream, self._collate = stream, collate

    def __getitem__(self, share: Share) -> Batch | bytes | Exception:
        try:
            made = self._collate(self._stream.read(share.numbers), share.total)
            return _packed(made) if get_worker_info() else made
        except (UserError, OSError) as error:  # returned: raised, it would come with a traceback for its message
            return error


def _packed(made: Batch) -> bytes:
    """A batch, its tensors moved to shared memory: here, not in the queue's thread, where an error would be lost.

    This pickle crosses a pipe between our own forks, and never lies on a disk.
    """
    try:
        return bytes(ForkingPickler.dumps(made))
    except (RuntimeError, OSError) as error:
        remedy = "raise /dev/shm or the limit of open files (ulimit -n), or set train.stream.workers=0"
        raise UserError(f"a batch finds no room in shared memory: {error}", remedy) from None


def _good(made: Batch | bytes | Exception) -> Batch:
    if isinstance(made, Exception):
        raise made
    batch: Batch = ForkingPickler.loads(made) if isinstance(made, bytes) else made
    return batch
