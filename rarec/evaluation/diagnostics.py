"""Alignment diagnostics: measures of the trained slots beside the text states of the frozen blocks.

A sample of items and users passes twice through a trained variant: once as text only, once with slots (docs/method.md,
section 4). Users are read up to their validation target, so no test target is seen. Every rank computes the whole
sample, which is small: a sharded model needs the same calls on all ranks, and nothing has to be gathered.

Shape letters: N items or users of the sample, B of a batch, T positions, L blocks with slots, M instructions, K vectors
of a source, D hidden size, E source dimension, S slots, Q soft tokens, W words.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rarec.config import RunConfig
from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import SINGLE, World
from rarec.evaluation.geometry import effective_rank, linear_cka, mean_cosine, nearest_rows
from rarec.evaluation.health import warnings
from rarec.ids.source import Source
from rarec.models.backbone import Pool, pool_text
from rarec.models.encode import text_batch
from rarec.models.llm_attention import slot_shares
from rarec.models.towers import RaRec, SideBatch, Tower, Vectors, side_batch, title_vectors
from rarec.prompts import Encoded, PromptPair, TextTokenizer
from rarec.ranking import EvalBatch

SAMPLE_SIZE = 256
"""Most items, and most users: chance moves CKA by less than .01 then, and the passes take little time."""
ATTENTION_PROMPTS = 32
"""Prompts of each side whose attention is measured."""
ATTENTION_BATCH = 4
"""Prompts at a time: eager attention of 32 heads over 512 positions takes 134 MB for them."""
NAMED_SLOTS = 5
"""Items, and users, whose slots are looked up among the words."""
NEAREST_WORDS = 8
ALIGNMENT_FIELDS = ("projection_cosine", "text_cosine", "projection_rank", "id_rank", "cka_before", "cka_after")

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
    def of_items(
        cls, dataset: PreparedDataset, prompts: PromptPair, sources: Mapping[str, Source], seed: int
    ) -> "SideSample":
        """Draw items at random; of these, take those that have a vector in every source, if there are any."""
        rng = np.random.default_rng([seed, *b"diagnostics"])
        rows = np.sort(rng.choice(dataset.n_items, min(SAMPLE_SIZE, dataset.n_items), replace=False))
        complete = np.all([source.items_NE[rows].any(-1) for source in sources.values()], axis=0)
        rows = rows[complete] if complete.any() else rows
        vectors = {name: source.items_NE[rows][:, None] for name, source in sources.items()}
        return cls("item", [dataset.titles[row] for row in rows], [prompts.item(int(row)) for row in rows], vectors)

    @classmethod
    def of_users(
        cls, dataset: PreparedDataset, prompts: PromptPair, sources: Mapping[str, Source], seed: int
    ) -> "SideSample":
        """Draw validation users at random, with their history before the validation target."""
        batch = EvalBatch.of(dataset, dataset.targets("validation", SAMPLE_SIZE, seed))
        rows, histories = batch.user_rows, batch.histories[:]
        vectors = {name: source.user_vectors(rows, histories) for name, source in sources.items()}
        names = [str(dataset.user_ids[int(row)]) for row in rows]
        encoded = [prompts.user(history) for history in histories]
        return cls("user", names, encoded, vectors | dict(title_vectors(encoded, prompts, sources)))

    def __len__(self) -> int:
        return len(self.prompts)

    def spread(self, count: int) -> npt.NDArray[np.int64]:
        """Return at most `count` indices of the sample, evenly spread."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))


class SoftTokens(NamedTuple):
    """The slots of one source on one side, in float32 on the CPU.

    Attributes:
        projections_LNKD: the projections p; None if the variant has none.
        instructions_LMD: the instructions c; None if the variant has none.
    """

    projections_LNKD: Tensor | None
    instructions_LMD: Tensor | None


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
) -> Row | None:
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
    inputs = (dataset, prompts, sources, config.run.seed)
    samples = [SideSample.of_users(*inputs), SideSample.of_items(*inputs)]
    measured = diagnose(model, samples, prompts.tokenizer, config.evaluate.batch_size, world)
    warned = warnings(measured, config)
    for warning in warned:
        say(f"alignment: {warning['text']}; {warning['advice']}")
    if not warned:
        say("alignment: no sign of collapse")
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
        tower: Tower = getattr(model, sample.side)
        if tower.alignment is None or not tower.slots or not len(sample):
            continue
        world.report(f"diagnosing {sample.side}s")
        side = _Side(model, sample, tokenizer, batch_size, world.device)
        tokens = side.soft_tokens()
        measured["n"][sample.side] = len(sample)
        measured["blocks"] += side.block_rows(tokens)
        measured["attention"] += side.attention_rows()
        if tokens and tower.alignment_blocks[0] == 0:
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
        states = self._text_states()
        for source, (p_LNKD, c_LMD) in tokens.items():
            ids_NE = torch.from_numpy(np.array(self.sample.vectors[source], np.float32)).mean(1)
            for index, (block, (text_ND, text_norm)) in enumerate(
                zip(self.tower.alignment_blocks, states, strict=True)
            ):
                p_NKD = None if p_LNKD is None else p_LNKD[index]
                values = {
                    "text_norm": text_norm,
                    "projection_norm": _median_norm(p_NKD),
                    "instruction_norm": _median_norm(None if c_LMD is None else c_LMD[index]),
                    **_alignment_values(p_NKD, ids_NE, text_ND),
                }
                finite = {name: _none_if_not_finite(value) for name, value in values.items()}
                yield {"side": self.sample.side, "source": source, "block": block, **finite}

    def attention_rows(self) -> list[Row]:
        """Return the rows of `attention`. Blocks before the first with slots hold fillers in their place: left out."""
        batches = self._batches(self.sample.spread(ATTENTION_PROMPTS), ATTENTION_BATCH)
        shares = slot_shares(self.model, self.sample.side, batches)
        first = self.tower.alignment_blocks[0]
        return [{"side": self.sample.side, **share._asdict()} for share in shares if share.block >= first]

    def word_rows(self, tokens: Mapping[str, SoftTokens]) -> list[Row]:
        """Return the rows of `words`: all instructions, and the slots of a few items or users."""
        slots = [(source, *slot) for source, own in tokens.items() for slot in self._named_slots(own)]
        queries_QD = torch.stack([slot_D for *_, slot_D in slots])
        with self.model.backbone.word_vectors() as table_VD:
            if table_VD.shape[1] != queries_QD.shape[1]:  # ELECTRA-small and MobileBERT widen them before block 0
                return []
            nearest = nearest_rows(table_VD[: len(self.tokenizer)], queries_QD, NEAREST_WORDS)
        rows = []
        for (source, slot, _), cosines_W, rows_W in zip(slots, *(part.tolist() for part in nearest), strict=True):
            words = [self.tokenizer.word(row) for row in rows_W]
            cosines = [_none_if_not_finite(value) for value in cosines_W]
            place = {"side": self.sample.side, "source": source, "slot": slot}
            rows.append({**place, "words": words, "cosines": cosines})
        return rows

    @torch.no_grad()
    def soft_tokens(self) -> dict[str, SoftTokens]:
        """Return the slots of each source, without those at titles.

        It calls the whole model, since a sharded one gathers its weights when called.
        """
        alignment = self.tower.alignment
        assert alignment is not None
        projected: dict[str, list[Tensor]] = {name: [] for name in alignment.slots}
        first_LSD = torch.empty(0)
        for batch in self._batches(np.arange(len(self.sample)), self.batch_size):
            encoding = self.model({self.sample.side: batch})[self.sample.side]
            if encoding.slots_LBKD is not None:
                first_LSD = encoding.slots_LBKD[:, 0].float().cpu()
            for name, projected_LBKD in encoding.projected.items():
                projected[name].append(projected_LBKD.float().cpu())
        tokens, start = {}, 0
        for name, source in alignment.named_sources():  # the slots hold [c || p] of each source, in this order
            own_LSD = first_LSD[:, start : start + source.count]
            start += source.count
            if source.shape.at_titles:
                continue
            instructions_LMD = own_LSD[:, : source.count - source.shape.vectors * source.projections]
            p_LNKD = torch.cat(projected[name], 1) if projected[name] else None
            tokens[name] = SoftTokens(p_LNKD, instructions_LMD if instructions_LMD.shape[1] else None)
        return tokens

    @torch.no_grad()
    def _text_states(self) -> list[tuple[Tensor, float]]:
        """Return the text-only states that enter each block with slots: pooled (N, D), and their median norm.

        The norm is over text positions. At block 0 these are word embeddings, as the architecture passes them on
        (scaled, with positions, normalised). The median, because a position that serves as attention sink can be a
        thousand times as long as the others.
        """
        backbone, parts = self.model.backbone, []
        for start in range(0, len(self.sample), self.batch_size):
            prompts = self.sample.prompts[start : start + self.batch_size]
            ids_BT, mask_BT = text_batch(prompts, self.tokenizer.filler, self.device)
            reduce = partial(_pool_and_norms, backbone.read_mask(mask_BT), backbone.pool)
            parts.append(backbone.block_inputs(ids_BT, mask_BT, self.tower.alignment_blocks, reduce))
        blocks = [[torch.cat(same) for same in zip(*batches, strict=True)] for batches in zip(*parts, strict=True)]
        return [(pooled_ND, float(norms.median())) for pooled_ND, norms in blocks]

    def _batches(self, indices: npt.NDArray[np.int64], size: int) -> Iterator[SideBatch]:
        """Yield batches of some of the sample in order, laid out with the tower's slots."""
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            vectors = {name: array[part] for name, array in self.sample.vectors.items()}
            prompts = [self.sample.prompts[index] for index in part]
            yield side_batch(prompts, vectors, self.tower, self.tokenizer.filler).to(self.device)

    def _named_slots(self, tokens: SoftTokens) -> Iterator[tuple[str, Tensor]]:
        """Yield names and slots (D,) at block 0."""
        if tokens.instructions_LMD is not None:
            yield from ((f"instruction {m}", c_D) for m, c_D in enumerate(tokens.instructions_LMD[0], 1))
        if tokens.projections_LNKD is not None:
            for index in self.sample.spread(NAMED_SLOTS):
                p_KD = tokens.projections_LNKD[0, index]
                for k, p_D in enumerate(p_KD, 1):
                    yield self.sample.names[index] + (f" (vector {k})" if len(p_KD) > 1 else ""), p_D


def _alignment_values(p_NKD: Tensor | None, ids_NE: Tensor, text_ND: Tensor) -> dict[str, float | None]:
    """Return the values of `ALIGNMENT_FIELDS`."""
    if p_NKD is None:
        return dict.fromkeys(ALIGNMENT_FIELDS)
    p_ND = p_NKD.mean(1)
    cosines = mean_cosine(p_ND), mean_cosine(text_ND)
    ranks = effective_rank(p_ND), effective_rank(ids_NE)
    alignment = linear_cka(ids_NE, text_ND), linear_cka(p_ND, text_ND)
    return dict(zip(ALIGNMENT_FIELDS, (*cosines, *ranks, *alignment), strict=True))


def _pool_and_norms(text_BT: Tensor, pool: Pool, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return pooled states (B, D), and the norms of all text positions as one vector."""
    norms_BT = torch.linalg.vector_norm(hidden_BTD, dim=-1, dtype=torch.float32)
    return pool_text(hidden_BTD, text_BT, pool).cpu(), norms_BT[text_BT.bool()].cpu()


def _median_norm(vectors_D: Tensor | None) -> float | None:
    """Return the median norm over all but the last dimension."""
    return None if vectors_D is None else float(vectors_D.norm(dim=-1).median())


def _none_if_not_finite(value: float | None) -> float | None:
    """Replace NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
