"""Alignment diagnostics: measures of the trained slots beside the text states of the frozen blocks.

Shape letters: N items or users of the sample, L blocks with slots, M instructions, K vectors of a source, D hidden
size, E source dimension, Q soft tokens, W words.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarec.config import RunConfig
from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import SINGLE, World
from rarec.evaluation.diagnostic_sample import Passes, SideSample, SoftTokens, TextStates, slot_pass, text_pass
from rarec.evaluation.geometry import effective_rank, linear_cka, mean_cosine, nearest_rows
from rarec.evaluation.health import warnings
from rarec.ids.source import Source
from rarec.models.llm_attention import slot_shares
from rarec.models.towers import RaRec, Tower
from rarec.prompts import PromptPair, TextTokenizer

ATTENTION_PROMPTS = 32
"""Prompts of each side whose attention is measured."""
ATTENTION_BATCH = 4
"""Prompts at a time: eager attention of 32 heads over 512 positions takes 134 MB for them."""
NAMED_SLOTS = 5
"""Items, and users, whose slots are looked up among the words."""
NEAREST_WORDS = 8
ALIGNMENT_FIELDS = ("projection_cosine", "text_cosine", "projection_rank", "id_rank", "cka_before", "cka_after")

Row = dict[str, Any]


def variant_diagnostics(
    model: RaRec,
    name: str,
    config: RunConfig,
    dataset: PreparedDataset,
    prompts: PromptPair,
    sources: Mapping[str, Source],
    *,
    say: Callable[[str], None],
    world: World = SINGLE,
) -> dict[str, Any] | None:
    """Return the contents of diagnostics.json for a trained variant. All ranks must call it; all get the same.

    Args:
        model: the variant, ready for inference.
        name: the variant's name.
        config: the run's configuration.
        dataset: for titles and validation users; no test target is read.
        prompts: both prompts over the catalogue's titles.
        sources: every source by name.
        say: prints one line to the user.
        world: this process among all ranks.

    Returns:
        The results of `diagnose` with `variant` and `warnings`; None if the variant has no slots.
    """
    if not model.user.slots and not model.item.slots:
        return None
    drawn = (dataset, prompts, sources, config.run.seed)
    samples = [SideSample.of_users(*drawn), SideSample.of_items(*drawn)]
    found = diagnose(model, samples, prompts.tokenizer, config.evaluate.batch_size, world)
    warned = warnings(found, config)
    for warning in warned:
        say(f"alignment: {warning['text']}; {warning['advice']}")
    if not warned:
        say("alignment: no sign of collapse")
    return {"variant": name, **found, "warnings": warned}


def diagnose(
    model: RaRec, samples: Sequence[SideSample], tokenizer: TextTokenizer, batch_size: int, world: World = SINGLE
) -> dict[str, Any]:
    """Measure the slots of a trained variant. All ranks must call it; all get the same.

    Args:
        model: the variant, ready for inference.
        samples: one for each side.
        tokenizer: of the language model.
        batch_size: prompts in a pass.
        world: this process among all ranks.

    Returns:
        `n`: sample size by side, for sides with slots.
        `blocks`: a row for each side, source and block with slots: median norms, mean cosines over pairs, effective
        ranks, and linear CKA of ID vectors (before) and of projections p (after) with text-only states.
        `attention`: a row for each side and block, from the first with slots on, with the fields of `SlotShare`; empty
        if the architecture gives no attention weights.
        `words`: slots at block 0 with the nearest words by cosine among input embeddings; empty if embeddings are
        narrower than hidden states.
        A value that is not defined is None.
    """
    passes = Passes(model, tokenizer.filler, batch_size, world.device)
    found: dict[str, Any] = {"n": {}, "blocks": [], "attention": [], "words": []}
    for sample in samples:
        tower: Tower = getattr(model, sample.side)
        if tower.alignment is None or not tower.slots or not len(sample):
            continue
        world.report(f"diagnosing {sample.side}s")
        found["n"][sample.side] = len(sample)
        states = text_pass(passes, sample, tower.alignment_blocks)
        tokens = slot_pass(passes, sample, tower, tower.alignment)
        found["blocks"] += _block_rows(sample, tokens, states, tower.alignment_blocks)
        found["attention"] += _attention_rows(passes, sample, tower)
        if tokens and tower.alignment_blocks[0] == 0:
            found["words"] += _word_rows(model, tokenizer, sample, tokens)
    return found


def _block_rows(
    sample: SideSample, tokens: Mapping[str, SoftTokens], states: Sequence[TextStates], blocks: Sequence[int]
) -> Iterator[Row]:
    for source, own in tokens.items():
        ids_NE = torch.from_numpy(np.array(sample.vectors[source], np.float32)).mean(1)
        for at, (block, text) in enumerate(zip(blocks, states, strict=True)):
            p_NKD = None if own.projections_LNKD is None else own.projections_LNKD[at]
            c_MD = None if own.instructions_LMD is None else own.instructions_LMD[at]
            values = {
                "text_norm": text.norm,
                "projection_norm": _median_norm(p_NKD),
                "instruction_norm": _median_norm(c_MD),
                **_alignment_values(p_NKD, ids_NE, text.pooled_ND),
            }
            plain = {name: _none_if_not_finite(value) for name, value in values.items()}
            yield {"side": sample.side, "source": source, "block": block, **plain}


def _alignment_values(p_NKD: Tensor | None, ids_NE: Tensor, text_ND: Tensor) -> dict[str, float | None]:
    """Return the values of `ALIGNMENT_FIELDS`; several vectors of a user are averaged, as in the alignment loss."""
    if p_NKD is None:
        return dict.fromkeys(ALIGNMENT_FIELDS)
    p_ND = p_NKD.mean(1)
    ranks = effective_rank(p_ND), effective_rank(ids_NE)
    alignment = linear_cka(ids_NE, text_ND), linear_cka(p_ND, text_ND)
    values = (mean_cosine(p_ND), mean_cosine(text_ND), *ranks, *alignment)
    return dict(zip(ALIGNMENT_FIELDS, values, strict=True))


def _attention_rows(passes: Passes, sample: SideSample, tower: Tower) -> list[Row]:
    """Return the rows of `attention`. Blocks before the first with slots hold fillers in their place: left out."""
    batches = sample.take(sample.spread(ATTENTION_PROMPTS)).batches(tower, ATTENTION_BATCH, passes.filler)
    shares = slot_shares(passes.model, sample.side, (batch.to(passes.device) for batch in batches))
    first = tower.alignment_blocks[0]
    return [{"side": sample.side, **share._asdict()} for share in shares if share.block >= first]


def _word_rows(
    model: RaRec, tokenizer: TextTokenizer, sample: SideSample, tokens: Mapping[str, SoftTokens]
) -> list[Row]:
    """Return the rows of `words`: all instructions, and the slots of a few items or users."""
    slots = [(source, *slot) for source, own in tokens.items() for slot in _named_slots(sample, own)]
    queries_QD = torch.stack([slot_D for *_, slot_D in slots])
    with model.backbone.word_vectors() as table_VD:
        if table_VD.shape[1] != queries_QD.shape[1]:  # ELECTRA-small and MobileBERT widen them before block 0
            return []
        cosines_QW, rows_QW = nearest_rows(table_VD[: len(tokenizer)], queries_QD, NEAREST_WORDS)
    return [
        {
            "side": sample.side,
            "source": source,
            "slot": slot,
            "words": [tokenizer.word(row) for row in rows_W],
            "cosines": [_none_if_not_finite(value) for value in cosines_W],
        }
        for (source, slot, _), rows_W, cosines_W in zip(slots, rows_QW.tolist(), cosines_QW.tolist(), strict=True)
    ]


def _named_slots(sample: SideSample, tokens: SoftTokens) -> Iterator[tuple[str, Tensor]]:
    """Yield names and slots (D,) at block 0."""
    if tokens.instructions_LMD is not None:
        yield from ((f"instruction {m}", c_D) for m, c_D in enumerate(tokens.instructions_LMD[0], 1))
    if tokens.projections_LNKD is not None:
        for at in sample.spread(NAMED_SLOTS):
            several = len(tokens.projections_LNKD[0, at]) > 1
            for k, p_D in enumerate(tokens.projections_LNKD[0, at], 1):
                yield sample.names[at] + (f" (vector {k})" if several else ""), p_D


def _median_norm(vectors_D: Tensor | None) -> float | None:
    """Return the median norm over all but the last dimension."""
    return None if vectors_D is None else float(vectors_D.norm(dim=-1).median())


def _none_if_not_finite(value: float | None) -> float | None:
    """Replace NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
