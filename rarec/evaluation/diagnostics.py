"""Alignment diagnostics: what the trained slots are like, beside what the frozen blocks know (ours).

Shape letters: N items or users of the sample, L blocks with slots, M instructions, K vectors of a source, D hidden
size, E source dimension, Q soft tokens, W words.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarec.evaluation.diagnostic_sample import Passes, SideSample, SoftTokens, TextStates, slot_pass, text_pass
from rarec.evaluation.geometry import effective_rank, linear_cka, mean_cosine, nearest_words
from rarec.models.llm_attention import slot_shares
from rarec.models.towers import RaRec, Tower
from rarec.prompts import TextTokenizer
from rarec.world import SINGLE, World

ATTENDING = 32
"""Prompts of a side whose attention is looked at."""
TOGETHER = 4
"""So many at a time: eager attention of 32 heads over 512 positions takes 134 MB for them."""
NAMED = 5
"""Items and users whose slots are put into words."""
WORDS = 8
ALIGNMENT_FIGURES = ("projection_cosine", "text_cosine", "projection_rank", "id_rank", "cka_before", "cka_after")

Row = dict[str, Any]


def diagnose(
    model: RaRec, samples: Sequence[SideSample], tokenizer: TextTokenizer, batch_size: int, world: World = SINGLE
) -> dict[str, Any]:
    """Look at a trained variant that is being served. All ranks must, and all get the same.

    Args:
        model: the variant.
        samples: one a side.
        tokenizer: of its language model.
        batch_size: prompts a pass.
        world: this process among those that do the same.

    Returns:
        What diagnostics.json holds, but for warnings. A figure that cannot be had is None.

        `n`: the sample's size by side; a side without slots is not there.
        `blocks`: a row a side, source and block with slots: Euclidean norms (medians), mean cosines over pairs,
        effective ranks, and linear CKA of ID vectors (before) and of projections p (after) with text-only states.
        `attention`: a row a side and block, from the first with slots on, with the shares of `SlotShare`; none where
        the architecture gives no attention weights.
        `words`: slots at block 0 with the words of the input embeddings that are nearest, and their cosines; none where
        embeddings are narrower than hidden states.
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
        if tower.alignment_blocks[0] == 0:
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
            figures = {
                "text_norm": text.norm,
                "projection_norm": _median_norm(p_NKD),
                "instruction_norm": _median_norm(c_MD),
                **_alignment_figures(p_NKD, ids_NE, text.pooled_ND),
            }
            plain = {name: _plain(value) for name, value in figures.items()}
            yield {"side": sample.side, "source": source, "block": block, **plain}


def _alignment_figures(p_NKD: Tensor | None, ids_NE: Tensor, text_ND: Tensor) -> dict[str, float | None]:
    """How the projections lie. Of several vectors of a user the mean is taken, as the alignment loss does."""
    if p_NKD is None:
        return dict.fromkeys(ALIGNMENT_FIGURES)
    p_ND = p_NKD.mean(1)
    ranks = effective_rank(p_ND), effective_rank(ids_NE)
    alignment = linear_cka(ids_NE, text_ND), linear_cka(p_ND, text_ND)
    figures = (mean_cosine(p_ND), mean_cosine(text_ND), *ranks, *alignment)
    return dict(zip(ALIGNMENT_FIGURES, figures, strict=True))


def _attention_rows(passes: Passes, sample: SideSample, tower: Tower) -> list[Row]:
    """Blocks before the first with slots see fillers in their place, and are left out."""
    batches = sample.take(sample.few(ATTENDING)).batches(tower, TOGETHER, passes.filler)
    shares = slot_shares(passes.model, sample.side, (batch.to(passes.device) for batch in batches))
    first = tower.alignment_blocks[0]
    return [{"side": sample.side, **share._asdict()} for share in shares if share.block >= first]


def _word_rows(
    model: RaRec, tokenizer: TextTokenizer, sample: SideSample, tokens: Mapping[str, SoftTokens]
) -> list[Row]:
    """Of the instructions, and of a few items or users."""
    slots = [(source, *slot) for source, own in tokens.items() for slot in _named_slots(sample, own)]
    queries_QD = torch.stack([slot_D for *_, slot_D in slots])
    with model.backbone.word_vectors() as table_VD:
        if table_VD.shape[1] != queries_QD.shape[1]:  # ELECTRA-small and MobileBERT widen them before block 0
            return []
        cosines_QW, rows_QW = nearest_words(table_VD[: len(tokenizer)], queries_QD, WORDS)
    return [
        {
            "side": sample.side,
            "source": source,
            "slot": slot,
            "words": [tokenizer.word(row) for row in rows_W],
            "cosines": [_plain(value) for value in cosines_W],
        }
        for (source, slot, _), rows_W, cosines_W in zip(slots, rows_QW.tolist(), cosines_QW.tolist(), strict=True)
    ]


def _named_slots(sample: SideSample, tokens: SoftTokens) -> Iterator[tuple[str, Tensor]]:
    """Slots (D,) at block 0, each with a name for people."""
    if tokens.instructions_LMD is not None:
        yield from ((f"instruction {m}", c_D) for m, c_D in enumerate(tokens.instructions_LMD[0], 1))
    if tokens.projections_LNKD is not None:
        for at in sample.few(NAMED):
            several = len(tokens.projections_LNKD[0, at]) > 1
            for k, p_D in enumerate(tokens.projections_LNKD[0, at], 1):
                yield sample.names[at] + (f" (vector {k})" if several else ""), p_D


def _median_norm(vectors_D: Tensor | None) -> float | None:
    """Over all but the last dimension."""
    return None if vectors_D is None else float(vectors_D.norm(dim=-1).median())


def _plain(value: float | None) -> float | None:
    """A figure for JSON, which has no NaN."""
    return value if value is not None and math.isfinite(value) else None
