"""An arm before its first step: the towers, their alignment's first values, what whitens their readout.

The first values come from stored text-only states; what whitens comes from passes of users and items through the arm as
it then is.

Shape letters: N items or users, L stored blocks, D hidden size, E source dimension, K vectors of a user.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rarec.config import Arm
from rarec.data.shards.stream import SampleStream
from rarec.models.alignment import AlignmentModule
from rarec.models.build import SIDES, build_model
from rarec.models.encode import side_batch
from rarec.models.initialise import initialise, typical_states
from rarec.models.load import LoadedModel
from rarec.models.towers import RaRec, SideBatch, Tower
from rarec.models.whitening import Moments, directions
from rarec.prompts import Encoded, lay_out
from rarec.stages.context import Context

MOST_USERS = 8192
"""About so many samples are looked at."""
MOST_ITEMS = 65_536
"""At most so many items are."""
PASSED = 2048
"""So many of either are passed through the arm."""
TYPICAL = 32
"""Among the texts of so many items the most typical position is looked for."""

Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]
Floats = npt.NDArray[np.floating]
Rows = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Start:
    """What an arm starts from.

    Attributes:
        items_N: item rows: all of them, or a random part of a large catalogue.
        passed_N: some of them, in random order.
        targets_N: item rows of the targets of the first training samples.
        vectors: for each source their users' (N, K, E).
        prompts: their users', of as many as are passed through the arm.
    """

    items_N: Rows
    passed_N: Rows
    targets_N: Rows
    vectors: dict[str, Floats]
    prompts: list[Encoded]


def bare_model(context: Context, arm: Arm, loaded: LoadedModel) -> RaRec:
    """An arm's towers, their weights not yet set."""
    return build_model(context.config, arm, loaded, context.shapes, context.prompts.sources)


def fresh_model(
    context: Context, arm: Arm, shards: dict[str, Any], item_states_NLD: Floats, stream: SampleStream
) -> RaRec:
    """An arm before its first step.

    LoRA, which changes nothing yet, is put on last: engines that shard may shard it only once.
    """
    start, plain = _start(context, stream), replace(arm, lora=False)
    model = bare_model(context, plain, context.load_llm(plain))
    with context.engine.serving(model.backbone), torch.no_grad():
        _align(context, model, start, item_states_NLD, shards)
        if context.config.readout.whiten:
            _whiten(context, model.eval(), start)
    if not arm.lora:
        return model
    worn = bare_model(context, arm, context.load_llm(arm))
    worn.user, worn.item = model.user, model.item
    return worn


def _start(context: Context, stream: SampleStream) -> Start:
    items, generator = context.dataset.n_items, np.random.default_rng([context.config.run.seed, *b"start"])
    items_N = np.arange(items)
    if items > MOST_ITEMS:
        items_N = np.sort(generator.choice(items, MOST_ITEMS, replace=False))
    passed_N = generator.permutation(items_N)[:PASSED]
    targets, prompts = list[int](), list[Encoded]()
    vectors: dict[str, list[Floats]] = {name: [] for name in context.sources}
    for batch in stream.epoch(0):
        for sample in batch:  # the samples themselves are large
            targets.append(sample.target)
            for name, vectors_KE in sample.vectors.items():
                vectors[name].append(vectors_KE.copy())
            if len(prompts) < PASSED:
                prompts.append(Encoded(sample.tokens_T.copy(), sample.marks))
        if len(targets) >= MOST_USERS:
            break
    stacked = {name: np.stack(of) for name, of in vectors.items()}
    return Start(items_N, passed_N, np.array(targets), stacked, prompts)


def _align(context: Context, model: RaRec, start: Start, item_states_NLD: Floats, shards: dict[str, Any]) -> None:
    """Each source from its vectors and texts: items' with their own, users' with their targets'."""
    config, stored = context.config.alignment, np.array(shards["state_blocks"])
    for side, rows_N in (("user", start.targets_N), ("item", start.items_N)):
        alignment: AlignmentModule | None = getattr(model, side).alignment
        if alignment is None:
            continue
        generator = torch.Generator().manual_seed(context.config.run.seed + (side == "item"))
        nearest = [int(np.abs(stored - block).argmin()) for block in alignment.blocks]
        states_LND = torch.from_numpy(item_states_NLD[rows_N][:, nearest].astype(np.float32)).transpose(0, 1)
        start_LD = _typical(context, model, start, alignment.blocks) if model.backbone.sink else None
        for name, source in alignment.named_sources():
            vectors_NE = context.sources[name].items_NE[rows_N] if side == "item" else start.vectors[name].mean(1)
            vectors = torch.from_numpy(np.ascontiguousarray(vectors_NE, np.float32))
            penalty = config.ridge if config.init == "ridge" else None
            initialise(source, vectors, states_LND, penalty=penalty, generator=generator, start_LD=start_LD)


def _typical(context: Context, model: RaRec, start: Start, blocks: Sequence[int]) -> torch.Tensor | None:
    """Where the slots of a decoder start; None where they do not enter it."""
    if len(model.backbone.blocks) in blocks:
        return None
    prompts = [context.prompts.item(int(row)) for row in start.passed_N[:TYPICAL]]
    laid = lay_out(prompts, {}, context.prompts.tokenizer.filler)
    ids_BT, mask_BT = (torch.from_numpy(a).to(model.backbone.device) for a in (laid.ids_BT, laid.mask_BT))
    return typical_states(model.backbone, ids_BT, mask_BT, blocks)


def _whiten(context: Context, model: RaRec, start: Start) -> None:
    """Every part of both readouts, by users and items passed through the arm; each rank has its share of them."""
    hidden, ranks = model.backbone.hidden_size, context.ranks
    found: dict[str, Moments] = {}
    for side in SIDES:
        tower: Tower = getattr(model, side).to(ranks.device)
        own = {part: Moments(hidden) for part in tower.readout.white}
        found |= {f"{side}.{part}": moments for part, moments in own.items()}
        seen: list[Parts] = []
        hook = tower.readout.register_forward_hook(
            lambda readout, given, _, seen=seen: seen.append(readout.parts(*given))
        )
        for mine, batch in _batches(context, tower, side, start):
            tower(model.backbone, batch.to(ranks.device))
            for part, (states_BD, there_B1) in seen.pop().items():
                if mine:
                    own[part].add(states_BD[there_B1[:, 0] > 0])
        hook.remove()
    for moments in found.values():
        ranks.merged(moments.sums)
    directions_ZD = directions(found, hidden, context.config.readout.size)
    for name, moments in found.items():
        side, part = name.split(".")
        getattr(model, side).readout.white[part].fit(moments, directions_ZD)


def _batches(context: Context, tower: Tower, side: str, start: Start) -> Iterator[tuple[bool, SideBatch]]:
    """This rank's share of the users or items, those of like length together."""
    if side == "user":
        prompts, vectors = start.prompts, start.vectors
    else:
        prompts = [context.prompts.item(int(row)) for row in start.passed_N]
        vectors = {name: source.items_NE[start.passed_N][:, None] for name, source in context.sources.items()}
    order = np.argsort([len(prompt.tokens_T) for prompt in prompts], kind="stable")
    size, filler = context.config.evaluate.batch_size, context.prompts.tokenizer.filler
    chunks = [order[at : at + size] for at in range(0, len(order), size)]
    context.ranks.at(f"passing {side}s through a fresh arm")
    for mine, chunk in context.ranks.in_step(chunks):
        chosen = {name: array[chunk] for name, array in vectors.items()}
        yield mine, side_batch([prompts[at] for at in chunk], chosen, tower, filler)
