"""The stream: samples in the plan's order, read from the tars one by one, each checked against the index.

No tar is read whole, nor opened before a sample of it is due: beginning in the middle costs what beginning does, and a
rank reads its own samples only.

Shape letters: S samples, n samples of a batch.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from rarec.data.shards.cuts import Numbers
from rarec.data.shards.form import Form
from rarec.data.shards.index import FRESH, REMAKE, Entries, key_of, tar_name
from rarec.data.shards.mapped import release
from rarec.data.shards.members import finite
from rarec.data.shards.plan import SHUFFLED_TOGETHER, Plan
from rarec.data.shards.samples import Sample, read_sample
from rarec.errors import UserError

OPEN = 2 * SHUFFLED_TOGETHER
"""Tars held open: a window of the plan lies in two groups of shards, unless they are tiny."""


class Tars(Protocol):
    """Where the tars are."""

    def name(self, shard: int) -> str:
        """Of a tar, for messages."""

    def open(self, shard: int) -> BinaryIO:
        """A tar, opened for reading."""

    def renew(self, shard: int) -> bool:
        """Get a tar that proved bad anew; False where there is no other copy."""


class LocalTars:
    """Tars in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def name(self, shard: int) -> str:
        """Its path."""
        return str(self.directory / tar_name(shard))

    def open(self, shard: int) -> BinaryIO:
        """A tar, opened for reading.

        Raises:
            UserError: it is missing or may not be read.
        """
        try:
            handle = os.open(self.name(shard), os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for ever
            return os.fdopen(handle, "rb")
        except FileNotFoundError:
            raise UserError(f"shard {self.name(shard)} is missing", REMAKE) from None
        except OSError as error:
            raise UserError(f"shard {self.name(shard)} cannot be read: {error.strerror}", REMAKE) from None

    def renew(self, shard: int) -> bool:
        """There is no other copy."""
        return False


class SampleStream:
    """Reads the batches of a plan.

    Args:
        plan: who comes when.
        index_S: where each sample lies, from `open_index`.
        tars: where the shards are.
        items: size of the catalogue.
        form: of every sample, where a model waits for it.
    """

    def __init__(self, plan: Plan, index_S: Entries, tars: Tars, items: int, form: Form | None = None) -> None:
        self.plan, self._items, self._form = plan, items, form
        self._index_S, self._tars = index_S, tars
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def epoch(self, epoch: int, first_step: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[Sample]]:
        """A rank's part of the epoch's batches from `first_step` on.

        Raises:
            UserError: a sample is not what the index says; names shard and key.
        """
        for batch in self.plan.batches(epoch, first_step):
            yield self.read(self.plan.share(batch, rank, world))

    def read(self, numbers_n: Numbers) -> list[Sample]:
        """These samples.

        Raises:
            UserError: one is not what the index says; names shard and key.
        """
        entries_n = self._index_S[numbers_n]
        release(self._index_S)
        return [self._sample(entry) for entry in entries_n]

    def _sample(self, entry: np.void) -> Sample:
        name = self._tars.name(int(entry["shard"]))
        try:
            sample = read_sample(self._extent(entry), entry, name)
        except UserError:
            self._close(int(entry["shard"]))
            if not self._tars.renew(int(entry["shard"])):
                raise
            sample = read_sample(self._extent(entry), entry, name)
        problem = self._problem(sample)
        if problem:
            raise UserError(f"shard {name}, sample {sample.key}: {problem}", FRESH)
        return sample

    def _extent(self, entry: np.void) -> bytes:
        """What stands at a sample's place; shorter where the tar ends before it."""
        shard = int(entry["shard"])
        if shard not in self._open:
            self._open[shard] = self._tars.open(shard)
            if len(self._open) > OPEN:
                self._close(next(iter(self._open)))
        self._open.move_to_end(shard)
        try:
            return os.pread(self._open[shard].fileno(), int(entry["size"]), int(entry["offset"]))
        except (OSError, OverflowError) as error:  # a bad sector; an offset beyond every file
            problem = f"shard {self._tars.name(shard)}, sample {key_of(entry)}: {error}"
            raise UserError(problem, REMAKE) from None

    def _close(self, shard: int) -> None:
        if shard in self._open:
            self._open.pop(shard).close()

    def _problem(self, sample: Sample) -> str | None:
        """What a step would stumble over, or not notice, though the bytes are those that were written."""
        rows_H = sample.history_H
        if sample.target >= self._items or rows_H.min(initial=0) < 0 or rows_H.max(initial=0) >= self._items:
            return f"an item's row is beyond the catalogue of {self._items}"
        if not all(finite(values) for values in (sample.states_LD, *sample.vectors.values())):
            return "a state or a vector is not a finite number"
        return self._form.unlike(sample) if self._form else None
