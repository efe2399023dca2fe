"""The training samples of a variant: the index of the shards, the tars, and the samples that are left out.

Shape letters: S samples.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rarec.config import RunConfig
from rarec.data.shards.batch_plan import BatchPlan, Numbers
from rarec.data.shards.index import Entries, open_index
from rarec.data.shards.samples import Sample, SampleSpec
from rarec.data.shards.stream import SampleStream, damaged_samples, name_samples, read_names
from rarec.data.shards.tars import LocalTars, RemoteTars, Tars
from rarec.errors import UserError
from rarec.storage.files import write_json

SKIPPED = "skipped.json"
"""In a variant's directory: the samples that its training leaves out, by shard and key."""
_NAMED = 5
"""Samples that a message names."""


def batch_plan(config: RunConfig, user_slots: int, index_S: Entries, excluded: Iterable[int] = ()) -> BatchPlan:
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


def first_samples(stream: SampleStream, count: int) -> Iterator[Sample]:
    """Read the first `count` samples of a training one by one, or all if there are fewer."""
    return (stream.read(np.array([number]))[0] for number in stream.plan.first_samples(count))


class Feed:
    """The training samples of a run, for one variant after the other.

    Args:
        config: the run.
        directory: directory of the shards.
        manifest: manifest of the shards.
        cache: directory for tars that are fetched from `train.stream.remote`.
        user_slots: most slots of a user prompt.
        say: prints one line to the user.

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
        self._tars = self._open_tars(cache)

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

    def stream(self, excluded: Numbers, items: int, spec: SampleSpec) -> SampleStream:
        """Return the samples in the order that the seed gives, without the excluded.

        Args:
            excluded: numbers of samples to leave out.
            items: size of the catalogue.
            spec: what each sample consists of.

        Raises:
            UserError: the configured batches cannot be made of these samples.
        """
        plan = batch_plan(self.config, self.user_slots, self.index_S, excluded)
        return SampleStream(plan, self.index_S, self._tars, items, spec)

    @cached_property
    def _damaged(self) -> Numbers:
        self.say(f"checking {len(self.index_S)} samples")
        return damaged_samples(self.index_S, LocalTars(self.directory), os.cpu_count() or 1)

    def _open_tars(self, cache: Path) -> Tars:
        stream = self.config.train.stream
        if stream.remote is None:
            return LocalTars(self.directory)
        if stream.damaged == "skip":
            problem = "train.stream: `damaged: skip` needs local tars, but `remote` is set"
            raise UserError(problem, "set train.stream.damaged=refuse, or read a local copy: train.stream.remote=null")
        return RemoteTars(stream.remote, self.manifest["shards"], cache, int(stream.cache_gb * 1e9))

    def _names(self, numbers: Numbers) -> str:
        named = name_samples(self.index_S, numbers[:_NAMED])
        names = ", ".join(f"{file} {key}" for file, keys in named.items() for key in keys)
        return names + (", ..." if len(numbers) > _NAMED else "")
