"""The sample of items and users for alignment diagnostics, and its two passes through a trained variant.

One pass is of the text only, one with slots (docs/method.md, section 4). Users are read up to their validation target,
so no test target is seen. Every rank computes the whole sample, which is small: a sharded model needs the same calls on
all ranks, and nothing has to be gathered.

Shape letters: N items or users of the sample, B of a batch, T positions, L blocks with slots, M instructions, K vectors
of a source, D hidden size, E source dimension, S slots.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rarec.data.dataset import PreparedDataset
from rarec.ids.source import Source
from rarec.models.alignment import AlignmentModule
from rarec.models.backbone import Pool, pool_text
from rarec.models.encode import Vectors, side_batch, text_batch, title_vectors
from rarec.models.towers import RaRec, SideBatch, Tower
from rarec.prompts import Encoded, PromptPair
from rarec.ranking import EvalBatch

Rows = npt.NDArray[np.int64]
SAMPLE_SIZE = 256
"""Most items, and most users: chance moves CKA by less than .01 then, and the passes take little time."""


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

    def spread(self, count: int) -> Rows:
        """Return at most `count` indices of the sample, evenly spread."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64))

    def take(self, indices: Rows) -> "SideSample":
        """Return the sample at these indices."""
        names, prompts = [self.names[at] for at in indices], [self.prompts[at] for at in indices]
        return SideSample(self.side, names, prompts, {name: array[indices] for name, array in self.vectors.items()})

    def batches(self, tower: Tower, size: int, filler: int) -> Iterator[SideBatch]:
        """Yield batches in order, laid out with the tower's slots."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            vectors = {name: array[part] for name, array in self.vectors.items()}
            yield side_batch(self.prompts[part], vectors, tower, filler)


@dataclass(frozen=True)
class Passes:
    """A model with what a pass of a sample needs.

    Attributes:
        model: the trained variant, ready for inference.
        filler: token id for slots and padding.
        batch_size: prompts at a time.
        device: the model's device.
    """

    model: RaRec
    filler: int
    batch_size: int
    device: torch.device


@dataclass(frozen=True)
class TextStates:
    """The states of text-only prompts that enter one block.

    Attributes:
        pooled_ND: the pooled states.
        norm: median norm over text positions. At block 0 these are word embeddings, as the architecture passes them on
            (scaled, with positions, normalised). The median, because a position that serves as attention sink can be a
            thousand times as long as the others.
    """

    pooled_ND: Tensor
    norm: float


@dataclass(frozen=True)
class SoftTokens:
    """The slots of one source on one side, in float32 on the CPU.

    Attributes:
        projections_LNKD: the projections p; None if the variant has none.
        instructions_LMD: the instructions c; None if the variant has none.
    """

    projections_LNKD: Tensor | None
    instructions_LMD: Tensor | None


@torch.no_grad()
def text_pass(passes: Passes, sample: SideSample, blocks: tuple[int, ...]) -> list[TextStates]:
    """Return the text-only states that enter each of `blocks`."""
    backbone, parts = passes.model.backbone, []
    for start in range(0, len(sample), passes.batch_size):
        prompts = sample.prompts[start : start + passes.batch_size]
        ids_BT, mask_BT = text_batch(prompts, passes.filler, passes.device)
        reduce = partial(_pool_and_norms, backbone.read_mask(mask_BT), backbone.pool)
        parts.append(backbone.block_inputs(ids_BT, mask_BT, blocks, reduce))
    whole = [[torch.cat(same) for same in zip(*batches, strict=True)] for batches in zip(*parts, strict=True)]
    return [TextStates(pooled_ND, float(norms.median())) for pooled_ND, norms in whole]


@torch.no_grad()
def slot_pass(passes: Passes, sample: SideSample, tower: Tower, alignment: AlignmentModule) -> dict[str, SoftTokens]:
    """Return the slots of each source, without those at titles.

    It calls the whole model, since a sharded one gathers its weights when called.
    """
    projected: dict[str, list[Tensor]] = {name: [] for name in alignment.slots}
    first_LSD = torch.empty(0)
    for batch in sample.batches(tower, passes.batch_size, passes.filler):
        encoding = passes.model({sample.side: batch.to(passes.device)})[sample.side]
        if encoding.slots_LBKD is not None:
            first_LSD = encoding.slots_LBKD[:, 0].float().cpu()
        for name, projected_LBKD in encoding.projected.items():
            projected[name].append(projected_LBKD.float().cpu())
    tokens, start = {}, 0
    for name, source in alignment.named_sources():  # the slots hold [c || p] of each source, in this order
        own_LSD, start = first_LSD[:, start : start + source.count], start + source.count
        if source.shape.at_titles:
            continue
        instructions_LMD = own_LSD[:, : source.count - source.shape.vectors * source.projections]
        p_LNKD = torch.cat(projected[name], 1) if projected[name] else None
        tokens[name] = SoftTokens(p_LNKD, instructions_LMD if instructions_LMD.shape[1] else None)
    return tokens


def _pool_and_norms(text_BT: Tensor, pool: Pool, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return pooled states (B, D), and the norms of all text positions as one vector."""
    norms_BT = torch.linalg.vector_norm(hidden_BTD, dim=-1, dtype=torch.float32)
    return pool_text(hidden_BTD, text_BT, pool).cpu(), norms_BT[text_BT.bool()].cpu()
