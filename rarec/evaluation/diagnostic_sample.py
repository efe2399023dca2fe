"""The items and users that alignment diagnostics look at: few, at random, fixed by the seed; never the test targets.

Shape letters: N items or users, K vectors of a source, E source dimension, B of a batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rarec.data.dataset import PreparedDataset
from rarec.evaluation.rankers import EvalBatch
from rarec.ids.source import Source
from rarec.models.alignment import AlignmentModule
from rarec.models.backbone import Pool, pool_text
from rarec.models.encode import Vectors, side_batch, text_batch
from rarec.models.towers import RaRec, SideBatch, Tower
from rarec.prompts import Encoded, PromptPair

Rows = npt.NDArray[np.int64]
SAMPLE = 256
"""Items, and as many users: chance moves CKA by less than .01 then, and a pass of them is little beside the ranking."""


@dataclass(frozen=True)
class SideSample:
    """One side's sample.

    Attributes:
        side: `user` or `item`.
        names: for people: titles, or the users' own ids (N).
        prompts: filled (N).
        vectors: for each source, (N, K, E).
    """

    side: str
    names: list[str]
    prompts: list[Encoded]
    vectors: Vectors

    @classmethod
    def of_items(
        cls, dataset: PreparedDataset, prompts: PromptPair, sources: Mapping[str, Source], seed: int
    ) -> "SideSample":
        """Items of the catalogue that have all of their vectors."""
        rng = np.random.default_rng([seed, *b"diagnostics"])
        rows = np.sort(rng.choice(dataset.n_items, min(SAMPLE, dataset.n_items), replace=False))
        there = np.all([source.items_NE[rows].any(-1) for source in sources.values()], axis=0)
        rows = rows[there] if there.any() else rows
        vectors = {name: source.items_NE[rows][:, None] for name, source in sources.items()}
        return cls("item", [dataset.titles[row] for row in rows], [prompts.item(int(row)) for row in rows], vectors)

    @classmethod
    def of_users(
        cls, dataset: PreparedDataset, prompts: PromptPair, sources: Mapping[str, Source], seed: int
    ) -> "SideSample":
        """Validation users, with what stands before their validation target."""
        asked = EvalBatch.of(dataset, dataset.targets("validation", SAMPLE, seed))
        rows, histories = asked.user_rows, asked.histories[:]
        vectors = {name: source.user_vectors(rows, histories) for name, source in sources.items()}
        names = [str(dataset.user_ids[int(row)]) for row in rows]
        return cls("user", names, [prompts.user(history) for history in histories], vectors)

    def __len__(self) -> int:
        return len(self.prompts)

    def few(self, count: int) -> Rows:
        """Places of at most so many of them, evenly spread."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))

    def take(self, places: Rows) -> "SideSample":
        """Only these."""
        names, prompts = [self.names[at] for at in places], [self.prompts[at] for at in places]
        return SideSample(self.side, names, prompts, {name: array[places] for name, array in self.vectors.items()})

    def batches(self, tower: Tower, size: int, filler: int) -> Iterator[SideBatch]:
        """In order, laid out with a tower's slots."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            vectors = {name: array[part] for name, array in self.vectors.items()}
            yield side_batch(self.prompts[part], vectors, tower, filler)


@dataclass(frozen=True)
class Passes:
    """How a sample goes through a model.

    Attributes:
        model: the variant, served.
        filler: token id for slots and padding.
        batch_size: prompts at a time.
        device: the model's.
    """

    model: RaRec
    filler: int
    batch_size: int
    device: torch.device


@dataclass(frozen=True)
class TextStates:
    """What one block gets of prompts without slots.

    Attributes:
        pooled_ND: h~.
        norm: the median norm of a text position's state. At block 0 that is a word embedding, as the architecture hands
            it on (scaled, with its position, normalised). The median, since a position that serves as attention sink
            can be a thousand times as long as the others.
    """

    pooled_ND: Tensor
    norm: float


@dataclass(frozen=True)
class SoftTokens:
    """A source's slots on one side, in float32 on the CPU.

    Attributes:
        projections_LNKD: p; None where the variant has none.
        instructions_LMD: c; None where there are none.
    """

    projections_LNKD: Tensor | None
    instructions_LMD: Tensor | None


@torch.no_grad()
def text_pass(passes: Passes, sample: SideSample, blocks: tuple[int, ...]) -> list[TextStates]:
    """What each of `blocks` gets without slots."""
    backbone, parts = passes.model.backbone, []
    for start in range(0, len(sample), passes.batch_size):
        prompts = sample.prompts[start : start + passes.batch_size]
        ids_BT, mask_BT = text_batch(prompts, passes.filler, passes.device)
        parts.append(
            backbone.entering(ids_BT, mask_BT, blocks, partial(_reduced, backbone.read(mask_BT), backbone.pool))
        )
    whole = [[torch.cat(same) for same in zip(*batches, strict=True)] for batches in zip(*parts, strict=True)]
    return [TextStates(pooled_ND, float(norms.median())) for pooled_ND, norms in whole]


@torch.no_grad()
def slot_pass(passes: Passes, sample: SideSample, tower: Tower, alignment: AlignmentModule) -> dict[str, SoftTokens]:
    """Each source's slots. The whole model is called, since an engine that shards it gathers weights by calls."""
    projected: dict[str, list[Tensor]] = {name: [] for name in alignment.slots}
    first_LSD = torch.empty(0)
    for batch in sample.batches(tower, passes.batch_size, passes.filler):
        encoding = passes.model({sample.side: batch.to(passes.device)})[sample.side]
        if encoding.slots_LBKD is not None:
            first_LSD = encoding.slots_LBKD[:, 0].float().cpu()
        for name, projected_LBKD in encoding.projected.items():
            projected[name].append(projected_LBKD.float().cpu())
    tokens, start = {}, 0
    for name, source in alignment.named_sources():  # in this order they share the slots, each [c || p]
        own_LSD, start = first_LSD[:, start : start + source.count], start + source.count
        instructions_LMD = own_LSD[:, : source.count - source.shape.vectors * source.projections]
        p_LNKD = torch.cat(projected[name], 1) if projected[name] else None
        tokens[name] = SoftTokens(p_LNKD, instructions_LMD if instructions_LMD.shape[1] else None)
    return tokens


def _reduced(text_BT: Tensor, pool: Pool, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled states (B, D), and the norms of all text positions in a row."""
    norms_BT = torch.linalg.vector_norm(hidden_BTD, dim=-1, dtype=torch.float32)
    return pool_text(hidden_BTD, text_BT, pool).cpu(), norms_BT[text_BT.bool()].cpu()
