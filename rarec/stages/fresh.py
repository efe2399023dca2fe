"""A variant before its first step: the towers, their alignment's first values, and a white readout.

The first values come from stored text-only states.

Shape letters: N items or users, L stored blocks, D hidden size, E source dimension.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rarec.config import Variant
from rarec.data.shards.stream import SampleStream
from rarec.models.alignment import AlignmentModule
from rarec.models.build import build_model
from rarec.models.initialise import initialise, typical_states
from rarec.models.load import LoadedModel
from rarec.models.text_states import text_batch
from rarec.models.towers import RaRec
from rarec.stages.run import Run
from rarec.stages.start import MOST_USERS, PASSED, Floats, Start, gather
from rarec.stages.whiten import whiten

TYPICAL = 32
"""Among the texts of so many items the most typical position is looked for."""


def bare_model(run: Run, variant: Variant, loaded: LoadedModel) -> RaRec:
    """A variant's towers, their weights not yet set."""
    return build_model(run.config, variant, loaded, run.shapes, run.prompts.sources)


def fresh_model(
    run: Run, variant: Variant, shards: dict[str, Any], item_states_NLD: Floats, stream: SampleStream
) -> RaRec:
    """A variant before its first step.

    LoRA, which changes nothing yet, is put on last: engines that shard may shard it only once.
    """
    plain, whitens = replace(variant, lora=False), run.config.readout.whiten
    model = bare_model(run, plain, run.load_llm(plain))
    aligns = model.user.alignment is not None or model.item.alignment is not None
    if aligns or whitens:
        start = gather(run, stream, MOST_USERS if aligns else PASSED)
        with run.engine.serving(model.backbone), torch.no_grad():
            _align(run, model, start, item_states_NLD, shards)
            if whitens:
                whiten(run, model.eval(), start)
    if not variant.lora:
        return model
    adapted = bare_model(run, variant, run.load_llm(variant))
    adapted.user, adapted.item = model.user, model.item
    return adapted


def _align(run: Run, model: RaRec, start: Start, item_states_NLD: Floats, shards: dict[str, Any]) -> None:
    """Each source from its vectors and texts: items' with their own, users' with their targets'."""
    config, stored = run.config.alignment, np.array(shards["state_blocks"])
    penalty = config.ridge if config.init == "ridge" else None
    start_LD = _typical(run, model, start)
    for side, rows_N in (("user", start.targets_N), ("item", start.items_N)):
        alignment: AlignmentModule | None = getattr(model, side).alignment
        if alignment is None:
            continue
        generator = torch.Generator().manual_seed(run.config.run.seed + (side == "item"))
        nearest = [int(np.abs(stored - block).argmin()) for block in alignment.blocks]
        states_LND = torch.from_numpy(item_states_NLD[rows_N][:, nearest].astype(np.float32)).transpose(0, 1)
        for name, source in alignment.named_sources():
            vectors_NE = run.sources[name].items_NE[rows_N] if side == "item" else start.vectors[name].mean(1)
            vectors = torch.from_numpy(np.ascontiguousarray(vectors_NE, np.float32))
            initialise(source, vectors, states_LND, penalty=penalty, generator=generator, start_LD=start_LD)


def _typical(run: Run, model: RaRec, start: Start) -> torch.Tensor | None:
    """Where the slots of a decoder start, of both sides; None in encoders, and where no slots enter the model.

    A map behind all blocks starts where that of the last one does.
    """
    blocks = model.user.alignment_blocks or model.item.alignment_blocks
    if not model.backbone.sink or not blocks:
        return None
    prompts = [run.prompts.item(int(row)) for row in start.passed_N[:TYPICAL]]
    ids_BT, mask_BT = text_batch(prompts, run.prompts.tokenizer.filler, model.backbone.device)
    states_LD = typical_states(model.backbone, ids_BT, mask_BT, blocks)
    return states_LD if model.user.through else torch.cat([states_LD, states_LD[-1:]])
