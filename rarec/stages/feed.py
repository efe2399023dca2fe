"""What feeds training: the shards' index, where the tars are, and which samples are left out.

Shape letters: S samples.
"""

import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rarec.config import RunConfig
from rarec.data.shards.batch_plan import BatchPlan, Numbers
from rarec.data.shards.index import Entries, map_npy, open_index
from rarec.data.shards.samples import SampleSpec
from rarec.data.shards.stream import SampleStream, damaged_samples, name_samples, read_names
from rarec.data.shards.tars import LocalTars, RemoteTars, Tars
from rarec.errors import UserError
from rarec.files import write_json
from rarec.models.build import SourceShape, slots_reserved
from rarec.stages.context import Context
from rarec.stages.shards import ITEM_STATES, sample_form

SKIPPED = "skipped.json"
"""In a variant's directory: the samples that its training leaves out, by shard and key."""
_NAMED = 5
"""Samples that a message names."""


def batch_plan(
    config: RunConfig, sources: Mapping[str, SourceShape], index_S: Entries, excluded: Iterable[int] = ()
) -> BatchPlan:
    """The batches that the configuration asks for.

    Raises:
        UserError: they cannot be made of these samples.
    """
    return BatchPlan(
        index_S["shard"],
        index_S["tokens"],
        config.run.seed,
        batch_size=config.train.batch_size,
        tokens_per_batch=config.train.tokens_per_batch,
        slots=sum(slots_reserved(config, sources)["user"].values()),
        excluded=excluded,
    )


class Feed:
    """The training samples of a run, for one variant after the other.

    Args:
        context: the run.
        manifest: of its shards.

    Raises:
        UserError: the index is not that of these shards, or `train.stream` asks for what cannot be.
    """

    def __init__(self, context: Context, manifest: dict[str, Any]) -> None:
        self.context, self.manifest = context, manifest
        self.index_S = open_index(context.paths.shards, manifest)
        self._tars = self._find_tars()

    def exclusions(self, directory: Path, begun: bool) -> Numbers:
        """The samples that a variant leaves out: those on its record; before its first step, those damaged now.

        Args:
            directory: of the variant.
            begun: whether it has taken a step.

        Raises:
            UserError: `train.stream.damaged` is `skip`, and samples were damaged since training began.
        """
        path = directory / SKIPPED
        recorded = read_names(path, self.index_S) if begun and path.exists() else np.array([], np.int64)
        if self.context.config.train.stream.damaged == "refuse":
            return recorded
        new = np.setdiff1d(self._damaged, recorded)
        if begun and len(new):
            problem = f"damaged since the training in {directory} began ({len(new)}): {self._names(new)}"
            raise UserError(problem, "mend them: rarec shards CONFIG --verify --repair; the same command then goes on")
        return recorded if begun else self._damaged

    def record(self, directory: Path, excluded: Numbers) -> None:
        """Tell which samples a variant leaves out, and write it down for its later sittings."""
        path = directory / SKIPPED
        if len(excluded):
            write_json(path, name_samples(self.index_S, excluded))
            line = f"damaged and left out ({len(excluded)}): {self._names(excluded)}; {path} names them all"
            self.context.say(line)
        else:
            path.unlink(missing_ok=True)

    def stream(self, excluded: Numbers) -> SampleStream:
        """The samples in the order that the seed gives, without the excluded.

        Raises:
            UserError: the configuration's batches cannot be made of them.
        """
        plan = batch_plan(self.context.config, self.context.shapes, self.index_S, excluded)
        return SampleStream(plan, self.index_S, self._tars, self.context.dataset.n_items, self._form)

    @property
    def _form(self) -> SampleSpec:
        states_NLD = map_npy(self.context.paths.shards / ITEM_STATES)
        embeddings = self.context.llm.backbone.model.get_input_embeddings()
        return sample_form(self.context, states_NLD.shape[1:], embeddings.num_embeddings)

    @cached_property
    def _damaged(self) -> Numbers:
        self.context.say(f"checking {len(self.index_S)} samples")
        return damaged_samples(self.index_S, LocalTars(self.context.paths.shards), os.cpu_count() or 1)

    def _find_tars(self) -> Tars:
        paths, stream = self.context.paths, self.context.config.train.stream
        if stream.remote is None:
            return LocalTars(paths.shards)
        if stream.damaged == "skip":
            remedy = "set train.stream.damaged=refuse, or read a local copy: train.stream.remote=null"
            raise UserError("train.stream: `damaged: skip` checks local tars; one behind a URL must be whole", remedy)
        return RemoteTars(stream.remote, self.manifest["shards"], paths.cache, int(stream.cache_gb * 1e9))

    def _names(self, numbers: Numbers) -> str:
        named = name_samples(self.index_S, numbers[:_NAMED])
        names = ", ".join(f"{file} {key}" for file, keys in named.items() for key in keys)
        return names + (", ..." if len(numbers) > _NAMED else "")
