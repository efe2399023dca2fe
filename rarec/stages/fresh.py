"""An arm before its first step: the towers, and alignment's first values from stored text-only states.

Shape letters: N items, L blocks, D hidden size, E source dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rarec.config import Arm
from rarec.data.shards.stream import SampleStream
from rarec.models.alignment import AlignmentModule
from rarec.models.build import build_model
from rarec.models.initialise import initialise
from rarec.models.load import LoadedModel
from rarec.models.towers import RaRec
from rarec.stages.context import Context

RIDGE_SAMPLES = 8192
"""At most so many samples' user vectors enter the ridge regression."""
RIDGE_ITEMS = 65_536
"""At most so many items."""


def bare_model(context: Context, arm: Arm, loaded: LoadedModel) -> RaRec:
    """An arm's towers, their weights not yet set."""
    return build_model(context.config, arm, loaded, context.shapes, context.prompts.sources)


def fresh_model(
    context: Context,
    arm: Arm,
    shards: dict[str, Any],
    item_states_NLD: npt.NDArray[np.floating],
    stream: SampleStream,
) -> RaRec:
    """An arm before its first step: alignment initialised from the text-only states."""
    model = bare_model(context, arm, context.load_llm(arm))
    seed = context.config.run.seed
    for side, alignment in (("user", model.user.alignment), ("item", model.item.alignment)):
        if alignment is not None:
            generator = torch.Generator().manual_seed(seed + (side == "item"))
            pairs = _item_pairs if side == "item" else _user_pairs
            _initialise(context, alignment, partial(pairs, context, stream), item_states_NLD, shards, generator)
    return model


Pairs = Callable[[str], tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]]


def _initialise(
    context: Context,
    alignment: AlignmentModule,
    pairs: Pairs,
    item_states_NLD: npt.NDArray[np.floating],
    shards: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """Each source from its pairs of vectors and texts; a block without stored states takes the nearest block's."""
    stored = np.array(shards["state_blocks"])
    nearest = [int(np.abs(stored - block).argmin()) for block in alignment.blocks]
    config = context.config.alignment
    penalty = config.ridge if config.init == "ridge" else None
    for name, source in alignment.named_sources():
        vectors_NE, item_rows = pairs(name)
        states_LND = torch.from_numpy(item_states_NLD[item_rows][:, nearest].astype(np.float32)).transpose(0, 1)
        vectors = torch.from_numpy(np.ascontiguousarray(vectors_NE, np.float32))
        initialise(source, vectors, states_LND, penalty=penalty, generator=generator)


def _item_pairs(context: Context, stream: SampleStream, source: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Items with their own texts: all of them, or a random part of a large catalogue."""
    items, seed = context.dataset.n_items, context.config.run.seed
    rows = np.arange(items)
    if items > RIDGE_ITEMS:
        rows = np.sort(np.random.default_rng([seed, *b"ridge"]).choice(items, RIDGE_ITEMS, replace=False))
    return context.sources[source].items_NE[rows], rows


def _user_pairs(context: Context, stream: SampleStream, source: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Users of the first training batches with the texts of their targets."""
    vectors, targets = [], list[int]()
    for batch in stream.epoch(0):
        vectors += [sample.vectors[source].mean(0) for sample in batch]  # the samples themselves are large
        targets += [sample.target for sample in batch]
        if len(targets) >= RIDGE_SAMPLES:
            break
    return np.stack(vectors), np.array(targets)
