"""Alignment diagnostics: measures of the trained slots beside the text states of the frozen blocks.

A sample of items and users passes twice through a trained variant: once as text only, once with slots (docs/method.md,
section 4). Users are read up to their validation target, so no test target is seen. Every rank computes the whole
sample, which is small: a sharded model needs the same calls on all ranks, and nothing has to be gathered.

Shape letters: N items or users of the sample, B of a batch, T positions, L blocks with slots, M instructions, K vectors
of a source, D hidden size, E source dimension, S slots, Q soft tokens, V rows of a table, W words.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from rarec.config import RunConfig
from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import SINGLE, World
from rarec.evaluation.collapse import alignment_values, warnings
from rarec.models.backbone import Pool, pool_text
from rarec.models.encode import Encoder, text_batch
from rarec.models.llm_attention import slot_shares
from rarec.models.towers import RaRec, SideBatch, Tower, Vectors, side_batch
from rarec.prompts import Encoded, TextTokenizer
from rarec.ranking.rank import EvalBatch

SAMPLE_SIZE = 256
"""Most items, and most users: chance moves CKA by less than .01 then, and the passes take little time."""
ATTENTION_PROMPTS, ATTENTION_BATCH = 32, 4
"""Prompts of each side whose attention is measured, and at a time: with 32 heads and 512 positions 4 take 134 MB."""
NAMED_SLOTS, NEAREST_WORDS = 5, 8
"""Items, and users, whose slots are looked up among the words, and the words of each slot."""
TABLE_ROWS = 8192
"""Rows of a table copied to float32 at a time: 134 MB with 4,096 dimensions. A whole table can take gigabytes."""

Row = dict[str, Any]


@dataclass(frozen=True)
class SideSample:
    """The sample of one side.

    Attributes:
        side: `user` or `item`.
        names: titles of items or ids of users (N).
        prompts: filled prompts (N).
        vectors: vectors of each source, (N, K, E).
    """

    side: str
    names: list[str]
    prompts: list[Encoded]
    vectors: Vectors

    @classmethod
    def of_items(cls, dataset: PreparedDataset, encoder: Encoder, seed: int) -> "SideSample":
        """Draw items at random; of these, take those that have a vector in every source, if there are any."""
        rng = np.random.default_rng([seed, *b"diagnostics"])
        rows = np.sort(rng.choice(dataset.n_items, min(SAMPLE_SIZE, dataset.n_items), replace=False))
        vectors = {name: source.items_NE[rows][:, None] for name, source in encoder.sources.items()}
        complete = np.all([array.any((1, 2)) for array in vectors.values()], axis=0)
        chosen = np.flatnonzero(complete) if complete.any() else np.arange(len(rows))
        names = [dataset.titles[row] for row in rows[chosen]]
        prompts = [encoder.prompts.item(int(row)) for row in rows[chosen]]
        return cls("item", names, prompts, {name: array[chosen] for name, array in vectors.items()})

    @classmethod
    def of_users(cls, dataset: PreparedDataset, encoder: Encoder, seed: int) -> "SideSample":
        """Draw validation users at random, with their history before the validation target."""
        batch = EvalBatch.of(dataset, dataset.targets("validation", SAMPLE_SIZE, seed))
        names = [str(dataset.user_ids[int(row)]) for row in batch.user_rows]
        return cls("user", names, *encoder.user_inputs(batch.user_rows, batch.histories[:]))

    def spread(self, count: int) -> npt.NDArray[np.int64]:
        """Return at most `count` indices of the sample, evenly spread."""
        return np.unique(np.linspace(0, len(self.names) - 1, min(count, len(self.names))).astype(np.int64))


class SoftTokens(NamedTuple):
    """The slots of one source on one side, in float32 on the CPU.

    Attributes:
        projections_LNKD: the projections p; K = 0 if the variant has none.
        instructions_LMD: the instructions c; M = 0 if the variant has none.
    """

    projections_LNKD: Tensor
    instructions_LMD: Tensor


def variant_diagnostics(
    encoder: Encoder, name: str, config: RunConfig, dataset: PreparedDataset, say: Callable[[str], None]
) -> Row | None:
    """Return the contents of diagnostics.json for a trained variant. All ranks must call it; all get the same.

    Args:
        encoder: of the variant, ready for inference.
        name: the variant's name.
        config: the run's configuration.
        dataset: for titles and validation users; no test target is read.
        say: prints one line to the user.

    Returns:
        The results of `diagnose` with `variant` and `warnings`; None if the variant has no slots.
    """
    model = encoder.model
    seed = config.run.seed
    if not model.user.slots and not model.item.slots:
        return None
    samples = [SideSample.of_users(dataset, encoder, seed), SideSample.of_items(dataset, encoder, seed)]
    measured = diagnose(model, samples, encoder.prompts.tokenizer, encoder.batch_size, encoder.world)
    warned = warnings(measured, config)
    for line in [f"{warning['text']}; {warning['advice']}" for warning in warned] or ["no sign of collapse"]:
        say(f"alignment: {line}")
    return {"variant": name, **measured, "warnings": warned}


def diagnose(
    model: RaRec, samples: Sequence[SideSample], tokenizer: TextTokenizer, batch_size: int, world: World = SINGLE
) -> Row:
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
    measured: Row = {"n": {}, "blocks": [], "attention": [], "words": []}
    for sample in samples:
        side = _Side(model, sample, tokenizer, batch_size, world.device)
        if not side.tower.slots or not sample.names:
            continue
        world.report(f"diagnosing {sample.side}s")
        tokens = side.soft_tokens()
        measured["n"][sample.side] = len(sample.names)
        measured["blocks"] += side.block_rows(tokens)
        measured["attention"] += side.attention_rows()
        if tokens and side.tower.alignment_blocks[0] == 0:
            measured["words"] += side.word_rows(tokens)
    return measured


class _Side:
    """One side of a trained variant, and the sample that passes through it."""

    def __init__(
        self, model: RaRec, sample: SideSample, tokenizer: TextTokenizer, batch_size: int, device: torch.device
    ) -> None:
        self.model, self.sample, self.tokenizer = model, sample, tokenizer
        self.batch_size, self.device = batch_size, device
        self.tower: Tower = getattr(model, sample.side)

    def block_rows(self, tokens: Mapping[str, SoftTokens]) -> Iterator[Row]:
        """Yield the rows of `blocks`. Several vectors of a user are averaged, as in the alignment loss."""
        states = list(zip(self.tower.alignment_blocks, self._text_states(), strict=True))
        for source, (p_LNKD, c_LMD) in tokens.items():
            ids_NE = torch.from_numpy(np.array(self.sample.vectors[source], np.float32)).mean(1)
            for index, (block, (text_ND, text_norm)) in enumerate(states):
                values = {
                    "text_norm": text_norm,
                    "projection_norm": _median_norm(p_LNKD[index]),
                    "instruction_norm": _median_norm(c_LMD[index]),
                    **alignment_values(p_LNKD[index], ids_NE, text_ND),
                }
                finite = {name: _none_if_not_finite(value) for name, value in values.items()}
                yield {"side": self.sample.side, "source": source, "block": block, **finite}

    def attention_rows(self) -> list[Row]:
        """Return the rows of `attention`. Blocks before the first with slots hold fillers in their place: left out."""
        batches = self._batches(self.sample.spread(ATTENTION_PROMPTS), ATTENTION_BATCH)
        shares = slot_shares(self.model, self.sample.side, batches)
        first = self.tower.alignment_blocks[0]
        return [{"side": self.sample.side, **share._asdict()} for share in shares if share.block >= first]

    def word_rows(self, tokens: Mapping[str, SoftTokens]) -> Iterator[Row]:
        """Yield the rows of `words`: all instructions, and the slots of a few items or users."""
        slots = [(source, *slot) for source, own in tokens.items() for slot in self._named_slots(own)]
        queries_QD = torch.stack([slot_D for *_, slot_D in slots])
        with self.model.backbone.word_vectors() as table_VD:
            if table_VD.shape[1] != queries_QD.shape[1]:  # ELECTRA-small and MobileBERT widen them before block 0
                return
            nearest = nearest_rows(table_VD[: len(self.tokenizer)], queries_QD, NEAREST_WORDS)
        for (source, slot, _), cosines_W, rows_W in zip(slots, *(part.tolist() for part in nearest), strict=True):
            words = [self.tokenizer.word(row) for row in rows_W]
            cosines = [_none_if_not_finite(value) for value in cosines_W]
            yield {"side": self.sample.side, "source": source, "slot": slot, "words": words, "cosines": cosines}

    @torch.no_grad()
    def soft_tokens(self) -> dict[str, SoftTokens]:
        """Return the slots of each source, without those at titles.

        It calls the whole model, since a sharded one gathers its weights when called.
        """
        alignment = self.tower.alignment
        assert alignment is not None
        projected: dict[str, list[Tensor]] = {}
        first_LSD = torch.empty(0)
        for batch in self._batches(np.arange(len(self.sample.names)), self.batch_size):
            encoding = self.model({self.sample.side: batch})[self.sample.side]
            first_LSD = encoding.slots_LBKD[:, 0].float().cpu()
            for name, p_LBKD in encoding.projected.items():
                projected.setdefault(name, []).append(p_LBKD.float().cpu())
        own_slots = first_LSD.split(list(alignment.slots.values()), 1)  # [c || p] of each source, in this order
        tokens = {}
        for (name, source), own_LSD in zip(alignment.named_sources(), own_slots, strict=True):
            if source.shape.at_titles:
                continue
            none_LNKD = own_LSD.new_empty(len(own_LSD), len(self.sample.names), 0, own_LSD.shape[2])
            p_LNKD = torch.cat(projected[name], 1) if name in projected else none_LNKD
            tokens[name] = SoftTokens(p_LNKD, own_LSD[:, : source.count - p_LNKD.shape[2]])
        return tokens

    def _text_states(self) -> Iterator[tuple[Tensor, float]]:
        """Yield the text-only states that enter each block with slots: pooled (N, D), and their median norm.

        The norm is over text positions. At block 0 these are word embeddings, as the architecture passes them on
        (scaled, with positions, normalised). The median, because a position that serves as attention sink can be a
        thousand times as long as the others.
        """
        backbone = self.model.backbone
        batches = []
        for start in range(0, len(self.sample.names), self.batch_size):
            prompts = self.sample.prompts[start : start + self.batch_size]
            ids_BT, mask_BT = text_batch(prompts, self.tokenizer.filler, self.device)
            reduce = partial(_pool_and_norms, backbone.read_mask(mask_BT), backbone.pool)
            batches.append(backbone.block_inputs(ids_BT, mask_BT, self.tower.alignment_blocks, reduce))
        for of_block in zip(*batches, strict=True):
            pooled_ND, norms = (torch.cat(parts) for parts in zip(*of_block, strict=True))
            yield pooled_ND, float(norms.median())

    def _batches(self, indices: npt.NDArray[np.int64], size: int) -> Iterator[SideBatch]:
        """Yield batches of some of the sample in order, laid out with the tower's slots."""
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            vectors = {name: array[part] for name, array in self.sample.vectors.items()}
            prompts = [self.sample.prompts[index] for index in part]
            yield side_batch(prompts, vectors, self.tower, self.tokenizer.filler).to(self.device)

    def _named_slots(self, tokens: SoftTokens) -> Iterator[tuple[str, Tensor]]:
        """Yield names and slots (D,) at block 0."""
        for m, c_D in enumerate(tokens.instructions_LMD[0], 1):
            yield f"instruction {m}", c_D
        for index in self.sample.spread(NAMED_SLOTS):
            p_KD = tokens.projections_LNKD[0, index]
            for k, p_D in enumerate(p_KD, 1):
                yield self.sample.names[index] + (f" (vector {k})" if len(p_KD) > 1 else ""), p_D


def nearest_rows(table_VD: Tensor, queries_QD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a table with the highest cosine to each query.

    Args:
        table_VD: such as a language model's input embeddings, of any type, on any device. Rows of zeros have cosine 0.
        queries_QD: the vectors to look up.
        count: W; fewer rows are returned if the table has fewer.

    Returns:
        Cosines (Q, W), highest first, and row numbers (Q, W), both on the CPU.
    """
    queries_QD = F.normalize(queries_QD.to(table_VD.device, torch.float32), dim=-1)
    parts = (F.normalize(part_VD.float(), dim=-1) for part_VD in table_VD.split(TABLE_ROWS))
    cosines_QV = torch.cat([queries_QD @ part_VD.T for part_VD in parts], 1)
    cosines_QW, rows_QW = cosines_QV.topk(min(count, len(table_VD)))
    return cosines_QW.cpu(), rows_QW.cpu()


def _pool_and_norms(text_BT: Tensor, pool: Pool, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return pooled states (B, D), and the norms of all text positions as one vector."""
    norms_BT = torch.linalg.vector_norm(hidden_BTD, dim=-1, dtype=torch.float32)
    return pool_text(hidden_BTD, text_BT, pool).cpu(), norms_BT[text_BT.bool()].cpu()


def _median_norm(vectors_D: Tensor) -> float | None:
    """Return the median norm over all but the last dimension; None if there are no vectors."""
    return float(vectors_D.norm(dim=-1).median()) if vectors_D.numel() else None


def _none_if_not_finite(value: float | None) -> float | None:
    """Replace NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
