"""What whitens the readout of an arm before its first step: passes of users and items through the arm as it then is."""

from collections.abc import Iterator
from typing import cast

import torch

from rarec.models.build import SIDES
from rarec.models.encode import side_batch
from rarec.models.towers import RaRec, Readout, SideBatch, Tower
from rarec.models.whitening import Moments, Whitening, directions
from rarec.prompts import by_length
from rarec.stages.context import Context
from rarec.stages.start import Start

Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Of a readout: each one's states, and whether it is there."""


def whiten(context: Context, model: RaRec, start: Start) -> None:
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
    if not ranks.first:  # other processors may turn them otherwise
        directions_ZD.zero_()
    ranks.merged(directions_ZD.numpy())
    for side in SIDES:
        readout: Readout = getattr(model, side).readout
        if readout.directions_ZD is not None:
            readout.directions_ZD.copy_(directions_ZD)
        for part, whitening in readout.white.items():
            cast(Whitening, whitening).fit(found[f"{side}.{part}"], directions_ZD)


def _batches(context: Context, tower: Tower, side: str, start: Start) -> Iterator[tuple[bool, SideBatch]]:
    """This rank's share of the users or items, those of like length together."""
    if side == "user":
        prompts, vectors = start.prompts, start.vectors
    else:
        prompts = [context.prompts.item(int(row)) for row in start.passed_N]
        vectors = {name: source.items_NE[start.passed_N][:, None] for name, source in context.sources.items()}
    size, filler = context.config.evaluate.batch_size, context.prompts.tokenizer.filler
    context.ranks.at(f"passing {side}s through a fresh arm")
    for mine, chunk in context.ranks.in_step(by_length(prompts, size)):
        chosen = {name: array[chunk] for name, array in vectors.items()}
        yield mine, side_batch([prompts[at] for at in chunk], chosen, tower, filler)
