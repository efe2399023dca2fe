"""The stream of training batches: order = f(seed, epoch), state = (epoch, step), every sample once an epoch.

WebDataset reads the tars; the plan of who comes when is ours (its own shuffles neither repeat nor resume). Batches hold
prompts of like length, so that little of a batch is padding.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rarec.data.samples import Sample, read_shard

_T = TypeVar("_T")
SHUFFLED_TOGETHER = 4
"""Shards whose samples are mixed; bounds how many are held in memory."""
SORTED_TOGETHER = 16
"""Batches among which samples are sorted by length."""


class ShardPlan:
    """Which samples make which batch, for every epoch.

    The samples are split over the steps as evenly as can be: sizes differ by at most one, none is a small remainder.

    Args:
        records: of the shards, from their manifest.
        batch_size: the largest batch.
        seed: of every order.
    """

    def __init__(self, records: list[dict[str, Any]], batch_size: int, seed: int) -> None:
        self.records, self.seed = records, seed
        self.samples = sum(record["samples"] for record in records)
        self.steps = -(-self.samples // batch_size)

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """The epoch's batches, each an array (size, 2) of shard and place in the shard."""
        rng = np.random.default_rng([self.seed, epoch])
        shards = rng.permutation(len(self.records))
        groups = [shards[at : at + SHUFFLED_TOGETHER] for at in range(0, len(shards), SHUFFLED_TOGETHER)]
        order = np.concatenate([rng.permutation(self._places(group)) for group in groups])
        parts = np.array_split(order, self.steps)
        windows = [parts[at : at + SORTED_TOGETHER] for at in range(0, self.steps, SORTED_TOGETHER)]
        return [batch for window in windows for batch in self._by_length(window, rng)]

    def _places(self, shards: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        counts = [self.records[shard]["samples"] for shard in shards]
        return np.stack([np.repeat(shards, counts), np.concatenate([np.arange(count) for count in counts])], 1)

    def _by_length(self, window: list[npt.NDArray[np.int64]], rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """The same samples in batches of like length, the batches in random order."""
        places = np.concatenate(window)
        lengths = np.array([self.records[shard]["lengths"][place] for shard, place in places])
        ordered = places[np.argsort(lengths, kind="stable")]
        batches = np.split(ordered, np.cumsum([len(batch) for batch in window])[:-1])
        return [batches[at] for at in rng.permutation(len(batches))]


class SampleStream:
    """Reads the batches of a plan from a directory of shards, holding a bounded number of them."""

    def __init__(self, directory: Path, plan: ShardPlan) -> None:
        self.directory, self.plan = directory, plan
        self._held: OrderedDict[int, list[Sample]] = OrderedDict()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Sample]]:
        """The epoch's batches from `first_step` on; what comes before is planned, not read.

        Raises:
            UserError: a shard is not what the manifest says.
        """
        for places in self.plan.batches(epoch)[first_step:]:
            yield [self._shard(int(shard))[int(place)] for shard, place in places]

    def _shard(self, index: int) -> list[Sample]:
        if index not in self._held:
            record = self.plan.records[index]
            self._held[index] = read_shard(self.directory / record["file"], record)
            if len(self._held) > 2 * SHUFFLED_TOGETHER:
                self._held.popitem(last=False)
        self._held.move_to_end(index)
        return self._held[index]


def prefetch(items: Iterable[_T], depth: int = 4) -> Iterator[_T]:
    """The same items, made ahead in a thread. An error there is raised here; leaving early stops the thread."""
    ready: queue.Queue[tuple[_T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: _T | None, error: BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # an item without an error
    finally:
        stopped.set()
        thread.join()
