"""`rarec shards`: select training samples, compute text-only states once, write the tars."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.artefacts import is_current, read_manifest, sha256_json, write_aside, write_json
from rarec.data.samples import Sample
from rarec.data.selection import Selection, select_samples
from rarec.data.shards import finish_shards, write_shards
from rarec.errors import UserError
from rarec.models.text_states import text_states
from rarec.prompts import Encoded
from rarec.stages.context import Context

ITEM_STATES = "item_states.npy"
TARGET_COUNTS = "target_counts.npy"
"""How often each item is the target of a selected sample, (N,): its chance to be drawn into a batch."""
SELECTION = "selection.json"


def shards(context: Context) -> None:
    """Make `shards/`: tars, item states, the selection's report, a manifest."""
    config, dataset = context.config, context.dataset
    directory = context.paths.shards
    context.start_over(directory)
    settings, made_from = _identity(context)
    if context.is_done(directory, "shards", settings, made_from):
        return
    selection = select_samples(dataset, config.shards, config.run.seed)
    blocks = state_blocks(context)
    _tell_size(context, len(selection.user_rows), len(blocks))
    directory.mkdir(parents=True, exist_ok=True)  # not aside: a killed stage goes on with the shards it has
    _write_item_states(context, blocks)
    targets = context.dataset.items_at(selection.user_rows, selection.positions)
    _save(directory / TARGET_COUNTS, np.bincount(targets, minlength=context.dataset.n_items))
    identity = sha256_json({"settings": settings, "made_from": made_from})
    total, per_shard = len(selection.user_rows), config.shards.samples_per_shard
    records = write_shards(
        directory, total, per_shard, lambda rows: _samples(context, selection, rows, blocks), identity, context.say
    )
    write_json(directory / SELECTION, selection.report)
    cut = context.prompts.cut
    finish_shards(directory, settings, made_from, shards=records, samples=total, state_blocks=blocks, cut_prompts=cut)
    context.say(f"{total} samples in {len(records)} shards")
    context.say(f"prompts cut to the context length: {cut['user']} of users, {cut['item']} of items")


def finished_shards(context: Context) -> dict[str, Any]:
    """The manifest of the shards.

    Raises:
        UserError: they are missing, or were made by other settings or from other inputs than lie here now.
    """
    directory = context.paths.shards
    manifest = read_manifest(directory, "shards")
    is_current(directory, "shards", *_identity(context))
    return manifest


def state_blocks(context: Context) -> list[int]:
    """The blocks whose states are stored.

    Raises:
        UserError: the model lacks one of them.
    """
    count = len(context.llm.backbone.blocks)
    chosen = context.config.shards.state_blocks
    blocks = sorted(set(chosen)) if chosen is not None else list(range(count))
    if blocks[-1] >= count:
        raise UserError(f"shards.state_blocks: the model has blocks 0 to {count - 1}, not {blocks[-1]}")
    return blocks


def _identity(context: Context) -> tuple[dict[str, Any], dict[str, str]]:
    """What shapes the shards: settings, and hashes of inputs."""
    return context.settings("shards", "prompt"), context.inputs


def _tell_size(context: Context, samples: int, blocks: int) -> None:
    width = np.dtype(context.config.shards.state_dtype).itemsize * context.llm.backbone.hidden_size * blocks
    users, items = samples * width / 1e6, context.dataset.n_items * width / 1e6
    sizes = f"{width / 1e3:.1f} kB a text, {users:.0f} MB for users, {items:.0f} MB for items"
    context.say(f"text-only states of {blocks} blocks: {sizes}")


def _write_item_states(context: Context, blocks: list[int]) -> None:
    prompts = [context.prompts.item(row) for row in range(context.dataset.n_items)]
    _save(context.paths.shards / ITEM_STATES, _states(context, prompts, blocks))


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    with write_aside(path) as file:
        np.save(file, array, allow_pickle=False)


def _samples(context: Context, selection: Selection, rows: range, blocks: list[int]) -> Iterator[Sample]:
    dataset = context.dataset
    users, positions = selection.user_rows[rows.start : rows.stop], selection.positions[rows.start : rows.stop]
    histories = [dataset.history(int(user), int(position)) for user, position in zip(users, positions, strict=True)]
    prompts = [context.prompts.user(history) for history in histories]
    states_BLD = _states(context, prompts, blocks)
    vectors = {name: source.user_vectors(users, histories) for name, source in context.sources.items()}
    for at, (user, position) in enumerate(zip(users.tolist(), positions.tolist(), strict=True)):
        target = int(dataset.sequence(user)[position])
        own = {name: array[at] for name, array in vectors.items()}
        tokens, marks = prompts[at].tokens_T, prompts[at].marks
        yield Sample(user, position, target, histories[at].astype(np.int32), tokens, marks, states_BLD[at], own)


def _states(context: Context, prompts: list[Encoded], blocks: list[int]) -> npt.NDArray[np.floating]:
    filler, dtype = context.llm.tokenizer.filler, context.config.shards.state_dtype
    return text_states(context.llm.backbone, prompts, blocks, filler, dtype=dtype)
