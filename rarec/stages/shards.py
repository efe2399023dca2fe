"""`rarec shards`: select training samples, compute text-only states once, write the tars."""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.artefacts import is_current, read_manifest, sha256_json
from rarec.config.identity import shard_settings
from rarec.data.selection.sampling import select_samples
from rarec.data.shards.expected import Expected, first_leak
from rarec.data.shards.samples import Sample, SampleSpec
from rarec.data.shards.tars import fetch_description
from rarec.data.shards.writing import drop_progress, finish_shards, write_shards
from rarec.errors import UserError
from rarec.files import write_aside, write_json
from rarec.models.text_states import Schedule, text_states
from rarec.prompts import Encoded
from rarec.prompts.hybrid import parse_template
from rarec.stages.context import Context

ITEM_STATES = "item_states.npy"
TARGET_COUNTS = "target_counts.npy"
"""How often each item is the target of a selected sample, (N,): its chance to be drawn into a batch."""
SELECTION = "selection.json"


def shards(context: Context) -> None:
    """Make `shards/`: tars, item states, the selection's report, a manifest."""
    with context.alone(context.paths.shards):
        _shards(context)


def _shards(context: Context) -> None:
    config, directory = context.config.shards, context.paths.shards
    remote = context.config.train.stream.remote
    if remote:  # made elsewhere
        context.start_over(directory)
        finished_shards(context)
        context.say(f"{directory} describes the shards at {remote}")
        return
    settings, made_from = _identity(context)
    if context.is_done(directory, "shards", settings, made_from):
        drop_progress(directory)  # a kill may have come between the manifest and this
        return
    parts, world = ShardParts(context), context.world
    parts.tell_size()
    context.start_over(directory)
    directory.mkdir(parents=True, exist_ok=True)  # not aside: a killed stage goes on with the shards it has
    identity = sha256_json({"settings": settings, "made_from": made_from})
    with context.engine.serving(context.llm.backbone):
        for name, make in parts.sidecars.items():
            world.report(f"making {name}")
            made = make()
            world.run_on_main(partial(parts.write, name, made))
        records = write_shards(
            directory,
            parts.total,
            config.samples_per_shard,
            parts.samples,
            identity,
            context.say,
            config.writers,
            world,
        )
    cut = {"user": parts.cut_users(), "item": context.prompts.cut["item"]}
    figures = {"state_blocks": parts.blocks, "cut_prompts": cut}
    world.run_on_main(lambda: finish_shards(directory, records, settings, made_from, parts.sidecars, **figures))
    context.say(f"{parts.total} samples in {len(records)} shards")
    context.say(f"prompts cut to the context length: {cut['user']} of users, {cut['item']} of items")


def finished_shards(context: Context) -> dict[str, Any]:
    """The manifest of the shards; if they lie elsewhere, all but their tars is fetched.

    Raises:
        UserError: they are missing, or were made by other settings or from other inputs than lie here now.
    """
    directory, remote = context.paths.shards, context.config.train.stream.remote
    if remote:
        fetch_description(remote, directory)
    manifest = read_manifest(directory, "shards")
    is_current(directory, "shards", *_identity(context))
    return manifest


def sample_form(context: Context, states: tuple[int, ...], vocabulary: int | None = None) -> SampleSpec:
    """What each sample is made of; no model is loaded for it.

    Args:
        context: the run.
        states: shape of the text-only states: blocks and, if it is known, width.
        vocabulary: of the language model, if it is loaded.
    """
    config = context.config
    vectors = {name: (shape.vectors_per_user, shape.dim) for name, shape in context.shapes.items()}
    parts = parse_template(config.prompt.user, ["history"], list(vectors), "prompt.user")
    marks = frozenset(part.value for part in parts if part.kind == "soft")
    return SampleSpec(states, np.dtype(config.shards.state_dtype), vectors, marks, vocabulary)


class ShardParts:
    """What the shards of a run are made of.

    Args:
        context: of the run.

    Raises:
        UserError: the selection holds something else than training interactions.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        config = context.config
        self.selection = select_samples(context.dataset, config.shards, config.run.seed, config.ids.held_out)
        stray = first_leak(context.dataset, self.selection.user_rows, self.selection.positions)
        if stray:
            problem = f"the selected sample {stray} is no training interaction with a history: validation or test leaks"
            raise UserError(problem, "this is a defect of rarec: please report it, with the configuration")

    @cached_property
    def cut_S(self) -> npt.NDArray[np.int8]:
        """Which samples' prompts were cut; -1 where they were not made here."""
        return np.full(self.total, -1, np.int8)

    @property
    def total(self) -> int:
        """Number of samples."""
        return len(self.selection.user_rows)

    def truth(self, form: SampleSpec) -> Expected:
        """What the tars should hold, given what each sample is made of."""
        selection, per_shard = self.selection, self.context.config.shards.samples_per_shard
        return Expected(self.context.dataset, selection.user_rows, selection.positions, per_shard, form)

    @cached_property
    def blocks(self) -> list[int]:
        """The blocks whose states are stored.

        Raises:
            UserError: the model lacks one of them.
        """
        count, chosen = len(self.context.llm.backbone.blocks), self.context.config.shards.state_blocks
        blocks = sorted(set(chosen)) if chosen is not None else list(range(count))
        if blocks[-1] >= count:
            raise UserError(f"shards.state_blocks: the model has blocks 0 to {count - 1}, not {blocks[-1]}")
        return blocks

    @property
    def target_counts_N(self) -> npt.NDArray[np.int64]:
        """How often each item is a target."""
        dataset, selection = self.context.dataset, self.selection
        return np.bincount(dataset.items_at(selection.user_rows, selection.positions), minlength=dataset.n_items)

    @property
    def sidecars(self) -> dict[str, Callable[[], Any]]:
        """What makes each file beside the tars and their index: an array, or JSON."""
        return {
            ITEM_STATES: self._item_states,
            TARGET_COUNTS: lambda: self.target_counts_N,
            SELECTION: lambda: self.selection.report,
        }

    def write(self, name: str, made: Any) -> None:
        """Write one of these files."""
        path = self.context.paths.shards / name
        if name == SELECTION:
            write_json(path, made)
            return
        with write_aside(path) as file:
            np.save(file, made, allow_pickle=False)

    def samples(self, places: range) -> Iterator[Sample]:
        """The samples at these places of the selection."""
        context, dataset = self.context, self.context.dataset
        users = self.selection.user_rows[places.start : places.stop]
        positions = self.selection.positions[places.start : places.stop]
        histories = [dataset.history(int(user), int(position)) for user, position in zip(users, positions, strict=True)]
        prompts = [context.prompts.user(history) for history in histories]
        self.cut_S[places.start : places.stop] = [prompt.cut for prompt in prompts]
        states_BLD = self._states(prompts, context.world.in_lockstep)
        vectors = {name: source.user_vectors(users, histories) for name, source in context.sources.items()}
        for at, (user, position) in enumerate(zip(users.tolist(), positions.tolist(), strict=True)):
            target = int(dataset.sequence(user)[position])
            own = {name: array[at] for name, array in vectors.items()}
            tokens, marks = prompts[at].tokens_T, prompts[at].marks
            yield Sample(user, position, target, histories[at].astype(np.int32), tokens, marks, states_BLD[at], own)

    def cut_users(self) -> int:
        """Number of samples whose prompt was cut; those that a killed run made are looked at again."""
        cut_S = self.context.world.all_reduce_max_(self.cut_S)
        for place in np.flatnonzero(cut_S < 0):
            user, position = int(self.selection.user_rows[place]), int(self.selection.positions[place])
            cut_S[place] = self.context.prompts.user(self.context.dataset.history(user, position)).cut
        return int(cut_S.sum())

    def tell_size(self) -> None:
        """Say what the stored states will take."""
        config, items = self.context.config.shards, self.context.dataset.n_items
        width = np.dtype(config.state_dtype).itemsize * self.context.llm.backbone.hidden_size * len(self.blocks)
        sizes = f"{self.total * width / 1e6:.0f} MB for users, {items * width / 1e6:.0f} MB for items"
        self.context.say(f"text-only states of {len(self.blocks)} blocks: {width / 1e3:.1f} kB a text, {sizes}")

    def _item_states(self) -> npt.NDArray[np.floating]:
        prompts, world = self.context.prompts, self.context.world
        items = [prompts.item(row) for row in range(self.context.dataset.n_items)]
        return world.all_reduce_sum_(self._states(items, world.split_in_lockstep))

    def _states(self, prompts: list[Encoded], schedule: Schedule) -> npt.NDArray[np.floating]:
        llm, dtype = self.context.llm, self.context.config.shards.state_dtype
        return text_states(llm.backbone, prompts, self.blocks, llm.tokenizer.filler, dtype=dtype, schedule=schedule)


def _identity(context: Context) -> tuple[dict[str, Any], dict[str, str]]:
    """What shapes the shards: settings, and hashes of inputs."""
    return shard_settings(context.config), context.inputs
