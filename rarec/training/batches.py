"""Samples become the input of a training step: tensors for both towers, and the targets of the losses.

Shape letters: b samples of this rank, H history, L stored blocks, D hidden size, N catalogue.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence

from rarec.data.shards.samples import Sample, fold_of
from rarec.ids.source import Source
from rarec.models.initialise import WHITENING_SIZE, FirstSamples
from rarec.models.losses import LossTargets
from rarec.models.towers import RaRec, SideBatch, Vectors, on_device, side_batch, title_vectors
from rarec.prompts import Encoded, PromptPair

_ITEMS_CACHED = 65_536
CRCS = 2**32
"""Number of CRC-32 checksums."""


@dataclass(frozen=True)
class Batch:
    """The input of one rank to a step, or to a part of a step.

    Attributes:
        users: prompts, slot positions and source vectors of the users.
        items: those of their target items.
        targets: further inputs of the losses.
        keys: keys of the samples, for messages.
        tokens: text and slots of both sides, without padding.
    """

    users: SideBatch
    items: SideBatch
    targets: LossTargets
    keys: tuple[str, ...]
    tokens: int

    @property
    def positions(self) -> int:
        """The number of positions of both sides, including padding."""
        return self.users.mask_BT.numel() + self.items.mask_BT.numel()

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on another device."""
        moved: Batch = on_device(self, device)
        return moved


class Collator:
    """Collates samples to batches for one model.

    Args:
        model: says how many slots its towers take.
        prompts: fills the item prompts; the most recent ones are cached.
        sources: every source by name, for the samples of each part of the users; a batch's rows are gathered here, so
            that tables need no memory on the device.
        item_states_NLD: stored text-only states of the catalogue, memory-mapped.
        id_dropout: share of the samples whose item's vectors are replaced by zeros. It depends on a sample's key alone
            whether it is one of them.
    """

    def __init__(
        self,
        model: RaRec,
        prompts: PromptPair,
        sources: Sequence[Mapping[str, Source]],
        item_states_NLD: npt.NDArray[np.floating],
        id_dropout: float,
    ) -> None:
        self.model, self.prompts, self.sources, self.item_states_NLD = model, prompts, sources, item_states_NLD
        self.id_dropout = id_dropout
        self._item = lru_cache(_ITEMS_CACHED)(prompts.item)

    def __call__(self, samples: Sequence[Sample], total: int) -> Batch:
        """Return a batch of this rank's samples, all of one part of the users, out of `total` on all ranks."""
        sources = self.sources[fold_of(samples[0].user, len(self.sources))]
        rows = np.array([sample.target for sample in samples])
        user_states_bLD = np.stack([sample.states_LD for sample in samples]).astype(np.float32)
        item_states_bLD = self.item_states_NLD[rows].astype(np.float32)
        histories = [torch.tensor(sample.history_H, dtype=torch.int64) for sample in samples]
        histories_bH = pad_sequence(histories, batch_first=True, padding_value=-1)
        users = self._users(samples, sources)
        items = self._items(rows, sources, np.array([crc32(sample.key.encode()) for sample in samples]) / CRCS)
        targets = LossTargets(
            torch.tensor([sample.user for sample in samples]),
            torch.from_numpy(rows),
            histories_bH,
            torch.from_numpy(user_states_bLD),
            torch.from_numpy(item_states_bLD),
            total,
        )
        tokens = int(users.mask_BT.sum() + items.mask_BT.sum())
        return Batch(users, items, targets, tuple(sample.key for sample in samples), tokens)

    def _users(self, samples: Sequence[Sample], sources: Mapping[str, Source]) -> SideBatch:
        prompts = [self.prompts.stored(sample.tokens_T, sample.marks, sample.history_H) for sample in samples]
        vectors: Vectors = {name: np.stack([sample.vectors[name] for sample in samples]) for name in sources}
        vectors = {**vectors, **title_vectors(prompts, self.prompts, sources)}
        return side_batch(prompts, vectors, self.model.user, self.prompts.tokenizer.filler)

    def _items(
        self, rows: npt.NDArray[np.int64], sources: Mapping[str, Source], draws_b: npt.NDArray[np.float64]
    ) -> SideBatch:
        kept_b11 = (draws_b >= self.id_dropout)[:, None, None]
        vectors = {name: source.items_NE[rows][:, None] * kept_b11 for name, source in sources.items()}
        prompts = [self._item(row) for row in rows.tolist()]
        return side_batch(prompts, vectors, self.model.item, self.prompts.tokenizer.filler)


def initial_samples(samples: Iterable[Sample], prompts: PromptPair) -> FirstSamples:
    """Copy what a variant's first values need from training samples; one sample is in memory at a time.

    Args:
        samples: the first training samples.
        prompts: the prompts over the catalogue's titles.
    """
    targets: list[int] = []
    encoded: list[Encoded] = []
    vectors: list[dict[str, npt.NDArray[np.float32]]] = []
    for sample in samples:
        targets.append(sample.target)
        vectors.append({name: vectors_KE.copy() for name, vectors_KE in sample.vectors.items()})
        if len(encoded) < WHITENING_SIZE:
            encoded.append(prompts.stored(sample.tokens_T.copy(), sample.marks, sample.history_H))
    stacked = {name: np.stack([each[name] for each in vectors]) for name in vectors[0]}
    return FirstSamples(np.array(targets), stacked, encoded)
