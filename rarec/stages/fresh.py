"""An arm before its first step: the towers, what whitens their readout, and alignment's first values.

All from stored text-only states: those of the catalogue, and of the users of the first training batches.

Shape letters: N items or users, L stored blocks, D hidden size, E source dimension, K vectors of a user.
"""

from dataclasses import dataclass
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
from rarec.models.whitening import whiten
from rarec.stages.context import Context

MOST_USERS = 8192
"""About so many samples are looked at."""
MOST_ITEMS = 65_536
"""At most so many items are."""

Floats = npt.NDArray[np.floating]
Rows = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Start:
    """What an arm starts from.

    Attributes:
        items_N: item rows: all of them, or a random part of a large catalogue.
        targets_N: item rows of the users' targets.
        users_ND: the users' final text-only states.
        vectors: for each source the users' (N, E), the mean where they have several.
    """

    items_N: Rows
    targets_N: Rows
    users_ND: Floats
    vectors: dict[str, Floats]


def bare_model(context: Context, arm: Arm, loaded: LoadedModel) -> RaRec:
    """An arm's towers, their weights not yet set."""
    return build_model(context.config, arm, loaded, context.shapes, context.prompts.sources)


def fresh_model(
    context: Context, arm: Arm, shards: dict[str, Any], item_states_NLD: Floats, stream: SampleStream
) -> RaRec:
    """An arm before its first step: readout whitened, alignment initialised."""
    model, start = bare_model(context, arm, context.load_llm(arm)), _start(context, stream)
    if context.config.readout.whiten:
        _whiten(model, start, item_states_NLD, context.config.readout.size)
    seed = context.config.run.seed
    for side, alignment in (("user", model.user.alignment), ("item", model.item.alignment)):
        if alignment is not None:
            generator = torch.Generator().manual_seed(seed + (side == "item"))
            _align(context, alignment, side, start, item_states_NLD, shards, generator)
    return model


def _start(context: Context, stream: SampleStream) -> Start:
    items, seed = context.dataset.n_items, context.config.run.seed
    items_N = np.arange(items)
    if items > MOST_ITEMS:
        items_N = np.sort(np.random.default_rng([seed, *b"ridge"]).choice(items, MOST_ITEMS, replace=False))
    targets, states = list[int](), list[Floats]()
    vectors: dict[str, list[Floats]] = {name: [] for name in context.sources}
    for batch in stream.epoch(0):
        for sample in batch:  # the samples themselves are large
            targets.append(sample.target)
            states.append(sample.states_LD[-1].copy())
            for name, vectors_KE in sample.vectors.items():
                vectors[name].append(vectors_KE.mean(0))
        if len(targets) >= MOST_USERS:
            break
    return Start(items_N, np.array(targets), np.stack(states), {name: np.stack(of) for name, of in vectors.items()})


@torch.no_grad()
def _whiten(model: RaRec, start: Start, item_states_NLD: Floats, size: int) -> None:
    items_ND = item_states_NLD[start.items_N, -1]
    users, items = (torch.from_numpy(states.astype(np.float32)) for states in (start.users_ND, items_ND))
    for tower, whitening in zip((model.user, model.item), whiten(users, items, size), strict=True):
        tower.readout.center_D.copy_(whitening.center_D)
        tower.readout.white_ZD.copy_(whitening.map_ZD)


def _align(
    context: Context,
    alignment: AlignmentModule,
    side: str,
    start: Start,
    item_states_NLD: Floats,
    shards: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """Each source from its vectors and texts: items' with their own, users' with their targets'."""
    blocks = _stored(shards["state_blocks"], alignment.blocks)
    rows_N = start.items_N if side == "item" else start.targets_N
    states_LND = torch.from_numpy(item_states_NLD[rows_N][:, blocks].astype(np.float32)).transpose(0, 1)
    config = context.config.alignment
    penalty = config.ridge if config.init == "ridge" else None
    for name, source in alignment.named_sources():
        vectors_NE = context.sources[name].items_NE[rows_N] if side == "item" else start.vectors[name]
        vectors = torch.from_numpy(np.ascontiguousarray(vectors_NE, np.float32))
        initialise(source, vectors, states_LND, penalty=penalty, generator=generator)


def _stored(stored: list[int], wanted: tuple[int, ...]) -> list[int]:
    """Where each block's states are stored, or the nearest block's; final states stand for none but themselves."""
    *inside, last = stored
    return [len(inside) if block == last else int(np.abs(np.array(inside) - block).argmin()) for block in wanted]
