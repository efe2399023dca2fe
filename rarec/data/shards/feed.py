"""The training samples of a run: the index of the shards, the tars, the plan, and the samples that are left out.

Shape letters: S samples.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rarec.config import RunConfig
from rarec.data.shards.batch_plan import BatchPlan, Numbers
from rarec.data.shards.files import RemoteTars, Tars, open_index, tar_name
from rarec.data.shards.loader import ShardDataset
from rarec.data.shards.samples import IndexRows, Sample, digest_of, key_of
from rarec.errors import UserError
from rarec.storage.files import read_json, write_json

SKIPPED = "skipped.json"
"""In a variant's directory: the samples that its training leaves out, by shard and key."""
_NAMED = 5
"""Samples that a message names."""


def batch_plan(config: RunConfig, user_slots: int, index_S: IndexRows, excluded: Iterable[int] = ()) -> BatchPlan:
    """Return the plan of the training batches.

    Args:
        config: the run.
        user_slots: most slots of a user prompt.
        index_S: index of the shards.
        excluded: numbers of samples to leave out.

    Raises:
        UserError: the configured batches cannot be made of these samples.
    """
    return BatchPlan(
        index_S["shard"],
        index_S["tokens"],
        config.run.seed,
        batch_size=config.train.batch_size,
        tokens_per_batch=config.train.tokens_per_batch,
        slots=user_slots,
        excluded=excluded,
    )


class Feed:
    """The training samples of a run, for one variant after the other.

    Args:
        config: the run.
        directory: directory of the shards.
        manifest: manifest of the shards.
        cache: directory for tars that are fetched from `train.stream.remote`.
        user_slots: most slots of a user prompt.
        say: prints one line to the user.

    Attributes:
        samples: the samples by number.

    Raises:
        UserError: the index does not belong to these shards, or the fields of `train.stream` contradict each other.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        manifest: dict[str, Any],
        cache: Path,
        user_slots: int,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.directory, self.manifest, self.say = config, directory, manifest, say
        self.user_slots = user_slots
        self.index_S = open_index(directory, manifest)
        stream = config.train.stream
        if stream.remote is not None and stream.damaged == "skip":
            problem = "train.stream: `damaged: skip` needs local tars, but `remote` is set"
            raise UserError(problem, "set train.stream.damaged=refuse, or read a local copy: train.stream.remote=null")
        tars = Tars(directory)
        if stream.remote is not None:
            tars = RemoteTars(stream.remote, manifest["shards"], cache, int(stream.cache_gb * 1e9))
        self.samples = ShardDataset(self.index_S, tars)

    def plan(self, excluded: Iterable[int] = ()) -> BatchPlan:
        """Return the plan of the batches, in the order that the seed gives; see `batch_plan`."""
        return batch_plan(self.config, self.user_slots, self.index_S, excluded)

    def first_samples(self, plan: BatchPlan, count: int) -> Iterator[Sample]:
        """Read the first `count` samples of a training one by one, or all if there are fewer."""
        return (self.samples[number] for number in plan.first_samples(count).tolist())

    def exclusions(self, variant: Path, begun: bool) -> Numbers:
        """Return the samples that a variant leaves out: the recorded ones; before its first step, those damaged now.

        Args:
            variant: directory of the variant.
            begun: whether its training has taken a step.

        Raises:
            UserError: `train.stream.damaged` is `skip`, and samples were damaged since training began.
        """
        path = variant / SKIPPED
        recorded = read_names(path, self.index_S) if begun and path.exists() else np.array([], np.int64)
        if self.config.train.stream.damaged == "refuse":
            return recorded
        new = np.setdiff1d(self._damaged, recorded)
        if begun and len(new):
            problem = f"{self.directory}: {len(new)} samples were damaged since the training in {variant} began"
            remedy = "repair them: rarec shards CONFIG --verify --repair; then run the same command to resume"
            raise UserError(f"{problem}: {self._names(new)}", remedy)
        return recorded if begun else self._damaged

    def record(self, variant: Path, excluded: Numbers) -> None:
        """Report the samples that a variant leaves out, and write them to its directory, where a resume reads them."""
        path = variant / SKIPPED
        if len(excluded):
            write_json(path, name_samples(self.index_S, excluded))
            self.say(f"left out {len(excluded)} damaged samples: {self._names(excluded)}; {path} lists all of them")
        else:
            path.unlink(missing_ok=True)

    @cached_property
    def _damaged(self) -> Numbers:
        self.say(f"checking {len(self.index_S)} samples")
        return damaged_samples(self.index_S, self.samples.tars, os.cpu_count() or 1)

    def _names(self, numbers: Numbers) -> str:
        named = name_samples(self.index_S, numbers[:_NAMED])
        names = ", ".join(f"{file} {key}" for file, keys in named.items() for key in keys)
        return names + (", ..." if len(numbers) > _NAMED else "")


def damaged_samples(index_S: IndexRows, tars: Tars, threads: int) -> Numbers:
    """Return the numbers of all samples whose bytes do not match the index, including those of missing tars.

    Args:
        index_S: index of the shards.
        tars: local shards.
        threads: number of shards read in parallel.

    Raises:
        UserError: a tar cannot be read.
    """
    shards = int(index_S["shard"][-1]) + 1

    def check(shard: int) -> list[int]:
        numbers = range(*(bisect_left(index_S["shard"], edge) for edge in (shard, shard + 1)))
        if not os.path.lexists(tars.name(shard)):
            return list(numbers)
        with tars.open(shard) as file:
            return [number for number in numbers if not _is_intact(file, index_S[number])]

    with ThreadPoolExecutor(threads) as pool:
        return np.array([number for numbers in pool.map(check, range(shards)) for number in numbers], np.int64)


def name_samples(index_S: IndexRows, numbers: Numbers) -> dict[str, dict[str, int]]:
    """Group sample numbers by file and key."""
    named: dict[str, dict[str, int]] = {}
    for number in numbers.tolist():
        named.setdefault(tar_name(int(index_S[number]["shard"])), {})[key_of(index_S[number])] = number
    return named


def read_names(path: Path, index_S: IndexRows) -> Numbers:
    """Read sample numbers from a file written with `name_samples`.

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


def _is_intact(file: BinaryIO, row: np.void) -> bool:
    try:
        return digest_of(os.pread(file.fileno(), int(row["size"]), int(row["offset"]))) == int(row["digest"])
    except OSError:  # a bad sector
        return False
