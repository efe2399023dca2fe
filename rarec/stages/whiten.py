"""What whitens the readout of a variant before its first step: passes of users and items through the variant as it then is."""

from collections.abc import Mapping
from typing import cast

import torch

from rarec.models.alignment import VECTORS
from rarec.models.build import SIDES
from rarec.models.encode import side_batches
from rarec.models.towers import RaRec, Tower
from rarec.models.whitening import Moments, Whitening, directions
from rarec.stages.run import Run
from rarec.stages.start import Start

Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Of a readout: each one's states, and whether it is there."""


def whiten(run: Run, model: RaRec, start: Start) -> None:
    """Every part of both readouts, by users and items passed through the variant; each rank has its share of them."""
    found = {f"{side}.{part}": of for side in SIDES for part, of in pass_through(run, model, side, start).items()}
    for moments in found.values():
        run.world.all_reduce_sum_(moments.sums)
    directions_ZD = directions(found, model.backbone.hidden_size, run.config.readout.size)
    if not run.world.is_main:  # other processors may turn them otherwise
        directions_ZD.zero_()
    run.world.all_reduce_sum_(directions_ZD.numpy())
    for side in SIDES:
        tower: Tower = getattr(model, side)
        readout = tower.readout
        if readout.directions_ZD is not None:
            readout.directions_ZD.copy_(directions_ZD)
        for part, whitening in readout.white.items():
            cast(Whitening, whitening).fit(found[f"{side}.{part}"], directions_ZD)
        if not tower.through:
            _rescale(tower)


def _rescale(tower: Tower) -> None:
    """Slots that are read as the alignment makes them get the unit of what whitens them.

    Directions in which they hardly vary are stretched so far that by a step of the common length they would lose
    what they start with.
    """
    white = cast(Mapping[str, Whitening], tower.readout.white)
    unit = white[VECTORS].unit if VECTORS in white else None
    if tower.alignment is not None and unit is not None:
        for _, source in tower.alignment.named_sources():
            source.rescale_last(unit)


def pass_through(run: Run, model: RaRec, side: str, start: Start) -> dict[str, Moments]:
    """Of each part of a side's readout, as this rank has seen it."""
    tower: Tower = getattr(model, side).to(run.world.device)
    found = {part: Moments(model.backbone.hidden_size) for part in tower.readout.white}
    seen: list[Parts] = []
    hook = tower.readout.register_forward_hook(lambda readout, given, _: seen.append(readout.parts(*given)))
    prompts, vectors = start.prompts, start.vectors
    if side == "item":
        prompts = [run.prompts.item(int(row)) for row in start.passed_N]
        vectors = {name: source.items_NE[start.passed_N][:, None] for name, source in run.sources.items()}
    size, filler = run.config.evaluate.batch_size, run.prompts.tokenizer.filler
    run.world.report(f"passing {side}s through a fresh variant")
    for mine, _, batch in side_batches(prompts, vectors, tower, filler, size, run.world):
        tower(model.backbone, batch)
        for part, (states_BD, there_B1) in seen.pop().items():
            if mine:
                found[part].add(states_BD[there_B1[:, 0] > 0])
    hook.remove()
    return found
