"""Read samples from the tars in the order of a batch plan, and verify each against the index.

No tar is read completely, or opened before it is needed: to start in the middle of an epoch costs as much as to start
at its beginning, and a rank reads only its own samples.

Shape letters: S samples, n samples of a batch.
"""

import os
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rarec.data.shards.batch_plan import BatchPlan, Numbers
from rarec.data.shards.index import REBUILD, REPAIR, Entries, digest_of, key_of, release_pages, tar_name
from rarec.data.shards.samples import Sample, SampleSpec, read_sample
from rarec.data.shards.tar_members import all_finite
from rarec.data.shards.tars import MAX_OPEN, LocalTars, Tars
from rarec.errors import UserError
from rarec.storage.files import read_json

SampleNames = dict[str, dict[str, int]]
"""Sample numbers by file and key."""


class SampleStream:
    """Read the batches of a plan.

    Args:
        plan: batch plan.
        index_S: location of each sample, from `open_index`.
        tars: access to the shards.
        items: number of items in the catalogue.
        spec: types and shapes of every sample; not checked if None.
    """

    def __init__(
        self, plan: BatchPlan, index_S: Entries, tars: Tars, items: int, spec: SampleSpec | None = None
    ) -> None:
        self.plan, self._items, self._spec = plan, items, spec
        self._index_S, self._tars = index_S, tars
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def epoch(self, epoch: int, first_step: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[Sample]]:
        """Yield a rank's part of each batch of an epoch, from `first_step` on.

        Args:
            epoch: number of the epoch.
            first_step: first step within the epoch.
            rank: rank of the reader.
            world: number of ranks.

        Raises:
            UserError: a sample does not match the index; the message names its shard and key.
        """
        for batch in self.plan.batches(epoch, first_step):
            yield self.read(self.plan.share(batch, rank, world))

    def read(self, numbers_n: Numbers) -> list[Sample]:
        """Return the samples with these numbers.

        Raises:
            UserError: a sample does not match the index; the message names its shard and key.
        """
        entries_n = self._index_S[numbers_n]
        release_pages(self._index_S)
        return [self._sample(entry) for entry in entries_n]

    def _sample(self, entry: np.void) -> Sample:
        name = self._tars.name(int(entry["shard"]))
        try:
            sample = read_sample(self._extent(entry), entry, name)
        except UserError:
            self._close(int(entry["shard"]))
            if not self._tars.drop_cached(int(entry["shard"])):
                raise
            sample = read_sample(self._extent(entry), entry, name)
        problem = self._problem(sample)
        if problem:
            raise UserError(f"shard {name}, sample {sample.key}: {problem}", REBUILD)
        return sample

    def _extent(self, entry: np.void) -> bytes:
        """Return the bytes at a sample's place; fewer if the tar ends earlier."""
        shard = int(entry["shard"])
        if shard not in self._open:
            self._open[shard] = self._tars.open(shard)
            if len(self._open) > MAX_OPEN:
                self._close(next(iter(self._open)))
        self._open.move_to_end(shard)
        try:
            return os.pread(self._open[shard].fileno(), int(entry["size"]), int(entry["offset"]))
        except (OSError, OverflowError) as error:  # a bad sector, or an offset beyond the file
            problem = f"shard {self._tars.name(shard)}, sample {key_of(entry)}: {error}"
            raise UserError(problem, REPAIR) from None

    def _close(self, shard: int) -> None:
        if shard in self._open:
            self._open.pop(shard).close()

    def _problem(self, sample: Sample) -> str | None:
        """Return a defect that would break a training step, or pass unnoticed, though the bytes are as written."""
        rows_H = sample.history_H
        if sample.target >= self._items or rows_H.min(initial=0) < 0 or rows_H.max(initial=0) >= self._items:
            return f"an item row is beyond the catalogue of {self._items}"
        if not all(all_finite(values) for values in (sample.states_LD, *sample.vectors.values())):
            return "a state or a vector has NaN or infinity"
        return self._spec.mismatch(sample) if self._spec else None


def damaged_samples(index_S: Entries, tars: LocalTars, threads: int) -> Numbers:
    """Find all samples whose bytes do not match the index; all samples of a missing tar count as damaged.

    Args:
        index_S: index of the shards.
        tars: local shards.
        threads: number of shards read in parallel.

    Returns:
        The numbers of the damaged samples.

    Raises:
        UserError: a tar cannot be read.
    """
    shards = int(index_S["shard"][-1]) + 1

    def check(shard: int) -> list[int]:
        rows = range(*(bisect_left(index_S["shard"], edge) for edge in (shard, shard + 1)))
        if not os.path.lexists(tars.name(shard)):
            return list(rows)
        with tars.open(shard) as file:
            return [row for row in rows if not _is_intact(file, index_S[row])]

    with ThreadPoolExecutor(threads) as pool:
        return np.array([row for part in pool.map(check, range(shards)) for row in part], np.int64)


def name_samples(index_S: Entries, numbers: Numbers) -> SampleNames:
    """Group sample numbers by file and key."""
    named: SampleNames = {}
    for number in numbers.tolist():
        named.setdefault(tar_name(int(index_S[number]["shard"])), {})[key_of(index_S[number])] = number
    return named


def read_names(path: Path, index_S: Entries) -> Numbers:
    """Read sample numbers from a file written with `name_samples`.

    Raises:
        UserError: the file is malformed, or does not match the index.
    """
    named = read_json(path)
    try:
        numbers = np.array(sorted(number for keys in named.values() for number in keys.values()), np.int64)
        agrees = numbers.min(initial=0) >= 0 and name_samples(index_S, numbers) == named
    except (AttributeError, TypeError, ValueError, IndexError, OverflowError):
        agrees = False
    if not agrees:
        raise UserError(f"{path} names samples that are not in these shards", "retrain: rarec train CONFIG --fresh")
    return numbers


def _is_intact(file: BinaryIO, entry: np.void) -> bool:
    try:
        extent = os.pread(file.fileno(), int(entry["size"]), int(entry["offset"]))
    except (OSError, OverflowError):  # a bad sector, or an offset beyond the file
        return False
    return bool(digest_of(extent) == entry["digest"])
