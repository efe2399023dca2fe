"""The content of a run's shards: selected samples with prompts and text-only states, and the files beside the tars.

Shape letters: S samples, B samples of a shard, N items, L stored blocks, D hidden size.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.data.selection.sampling import select_samples
from rarec.data.shards.expected import Expected, first_leak
from rarec.data.shards.samples import Sample, SampleSpec
from rarec.errors import UserError
from rarec.models.encode import STATES_AT_A_TIME, Split, text_states
from rarec.prompts import Encoded, slot_names
from rarec.stages.run import Run
from rarec.storage.files import atomic_write, write_json

ITEM_STATES = "item_states.npy"
TARGET_COUNTS = "target_counts.npy"
"""Number of selected samples with each item as target, (N,): the item's chance to be drawn into a batch."""
SELECTION = "selection.json"


def sample_spec(run: Run, states: tuple[int, ...], vocabulary: int | None = None) -> SampleSpec:
    """Return the types and shapes of a sample's fields; no model is loaded.

    Args:
        run: the run.
        states: shape of the text-only states: blocks and, if known, width.
        vocabulary: vocabulary size of the language model, if it is loaded.
    """
    config = run.config
    vectors = {name: (shape.vectors_per_user, shape.dim) for name, shape in run.shapes.items()}
    marks = frozenset(slot_names(config.prompt, "user", list(vectors)))
    return SampleSpec(states, np.dtype(config.shards.state_dtype), vectors, marks, vocabulary)


class ShardContent:
    """Makes the samples of a run's shards, and the files beside the tars.

    Args:
        run: the run.

    Raises:
        UserError: the selection has something other than training interactions.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        config = run.config
        self.selection = select_samples(run.dataset, config.shards, config.run.seed, config.ids.held_out)
        leak = first_leak(run.dataset, self.selection.user_rows, self.selection.positions)
        if leak:
            problem = f"the selected sample {leak} is no training interaction with a history: validation or test leaks"
            raise UserError(problem, "this is a defect of rarec: please report it, with the configuration")

    @cached_property
    def cut_S(self) -> npt.NDArray[np.int8]:
        """For each sample, whether its prompt was cut; -1 if it was not made in this process."""
        return np.full(self.total, -1, np.int8)

    @property
    def total(self) -> int:
        """The number of samples."""
        return len(self.selection.user_rows)

    def expected(self, spec: SampleSpec) -> Expected:
        """Return the expected content of the tars, given a sample's types and shapes."""
        selection, per_shard = self.selection, self.run.config.shards.samples_per_shard
        return Expected(self.run.dataset, selection.user_rows, selection.positions, per_shard, spec)

    @cached_property
    def blocks(self) -> list[int]:
        """The blocks whose states are stored.

        Raises:
            UserError: the model lacks one of them.
        """
        count, chosen = len(self.run.llm.backbone.blocks), self.run.config.shards.state_blocks
        blocks = sorted(set(chosen)) if chosen is not None else list(range(count))
        if blocks[-1] >= count:
            problem = f"shards.state_blocks: the model has no block {blocks[-1]}"
            raise UserError(problem, f"choose from blocks 0 to {count - 1}")
        return blocks

    @property
    def target_counts_N(self) -> npt.NDArray[np.int64]:
        """The number of selected samples with each item as target."""
        dataset, selection = self.run.dataset, self.selection
        return np.bincount(dataset.items_at(selection.user_rows, selection.positions), minlength=dataset.n_items)

    @property
    def sidecars(self) -> dict[str, Callable[[], Any]]:
        """For each file beside the tars and their index, a function that computes it: an array, or JSON."""
        return {
            ITEM_STATES: self._item_states,
            TARGET_COUNTS: lambda: self.target_counts_N,
            SELECTION: lambda: self.selection.report,
        }

    def samples(self, places: range) -> Iterator[Sample]:
        """Yield the samples at these places of the selection."""
        run, dataset = self.run, self.run.dataset
        users = self.selection.user_rows[places.start : places.stop]
        positions = self.selection.positions[places.start : places.stop]
        histories = [dataset.history(int(user), int(position)) for user, position in zip(users, positions, strict=True)]
        prompts = [run.prompts.user(history) for history in histories]
        self.cut_S[places.start : places.stop] = [prompt.cut for prompt in prompts]
        states_BLD = self._states(prompts, run.world.in_lockstep)
        vectors = {name: source.user_vectors(users, histories) for name, source in run.sources.items()}
        for at, (user, position) in enumerate(zip(users.tolist(), positions.tolist(), strict=True)):
            target = int(dataset.sequence(user)[position])
            own = {name: array[at] for name, array in vectors.items()}
            tokens, marks = prompts[at].tokens_T, prompts[at].marks
            yield Sample(user, position, target, histories[at].astype(np.int32), tokens, marks, states_BLD[at], own)

    def cut_users(self) -> int:
        """Return the number of samples whose prompt was cut; prompts that an earlier process made are made again."""
        cut_S = self.run.world.all_reduce_max_(self.cut_S)
        for place in np.flatnonzero(cut_S < 0):
            user, position = int(self.selection.user_rows[place]), int(self.selection.positions[place])
            cut_S[place] = self.run.prompts.user(self.run.dataset.history(user, position)).cut
        return int(cut_S.sum())

    def say_size(self) -> None:
        """Print the size of the stored states."""
        config, items = self.run.config.shards, self.run.dataset.n_items
        width = np.dtype(config.state_dtype).itemsize * self.run.llm.backbone.hidden_size * len(self.blocks)
        sizes = f"{self.total * width / 1e6:.0f} MB for users, {items * width / 1e6:.0f} MB for items"
        self.run.say(f"text-only states of {len(self.blocks)} blocks: {width / 1e3:.1f} kB a text, {sizes}")

    def _item_states(self) -> npt.NDArray[np.floating]:
        """Return the states of the catalogue, (N, L, D), some items at a time."""
        run, n_items = self.run, self.run.dataset.n_items
        shape = (n_items, len(self.blocks), run.llm.backbone.hidden_size)
        states_NLD = run.scratch.zeros(shape, run.config.shards.state_dtype)
        for start in range(0, n_items, STATES_AT_A_TIME):
            part = slice(start, start + STATES_AT_A_TIME)
            prompts = [run.prompts.item(row) for row in range(n_items)[part]]
            states_NLD[part] = run.world.all_reduce_sum_(self._states(prompts, run.world.split_in_lockstep))
        return states_NLD

    def _states(self, prompts: list[Encoded], split: Split) -> npt.NDArray[np.floating]:
        llm, dtype = self.run.llm, self.run.config.shards.state_dtype
        return text_states(llm.backbone, prompts, self.blocks, llm.tokenizer.filler, dtype=dtype, split=split)


def write_sidecar(path: Path, made: Any) -> None:
    """Write a file beside the tars: an array, or JSON."""
    if path.suffix == ".json":
        write_json(path, made)
        return
    with atomic_write(path) as file:
        np.save(file, made, allow_pickle=False)
