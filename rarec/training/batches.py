"""From samples of the stream to what a step takes: both sides as tensors, and what the losses need to know.

Shape letters: b samples of this rank, H history, L stored blocks, D hidden size, N catalogue.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch

from rarec.data.shards.samples import Sample
from rarec.ids.source import Source
from rarec.models.encode import side_batch
from rarec.models.objective import Targets
from rarec.models.towers import RaRec, SideBatch
from rarec.prompts import Encoded, PromptPair

_ITEMS_KEPT = 65_536
CRCS = 2**32
"""How many checksums there are."""


@dataclass(frozen=True)
class Batch:
    """What one rank puts into a step, or into a part of one.

    Attributes:
        users: prompts, slots' places and source vectors of the users.
        items: those of their target items.
        targets: for the losses.
        keys: of the samples, to name them in messages.
        tokens: text and slots of both sides, without padding.
    """

    users: SideBatch
    items: SideBatch
    targets: Targets
    keys: tuple[str, ...]
    tokens: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(self.users.to(device), self.items.to(device), self.targets.to(device), self.keys, self.tokens)


class Collator:
    """Makes batches for one model.

    Args:
        model: says how many slots its towers take.
        prompts: fills the item prompts; those of the items met last are kept.
        sources: every source by name; rows of a batch are gathered here, so tables stay off the device.
        item_states_NLD: stored text-only states of the catalogue, memory-mapped.
        id_dropout: share of the samples whose item stands without its vectors; which ones, their keys alone decide.
    """

    def __init__(
        self,
        model: RaRec,
        prompts: PromptPair,
        sources: Mapping[str, Source],
        item_states_NLD: npt.NDArray[np.floating],
        id_dropout: float,
    ) -> None:
        self.model, self.prompts, self.sources, self.item_states_NLD = model, prompts, sources, item_states_NLD
        self.id_dropout = id_dropout
        self._item = lru_cache(_ITEMS_KEPT)(prompts.item)

    def __call__(self, samples: Sequence[Sample], total: int) -> Batch:
        """A batch of these samples, which are this rank's of `total`."""
        rows = np.array([sample.target for sample in samples])
        user_states_bLD = _states([sample.states_LD for sample in samples])
        item_states_bLD = _states(list(self.item_states_NLD[rows]))
        users = self._users(samples)
        items = self._items_of(rows, np.array([crc32(sample.key.encode()) for sample in samples]) / CRCS)
        targets = Targets(
            torch.tensor([sample.user for sample in samples]),
            torch.from_numpy(rows),
            _padded([sample.history_H for sample in samples]),
            user_states_bLD,
            item_states_bLD,
            total,
        )
        tokens = int(users.mask_BT.sum() + items.mask_BT.sum())
        return Batch(users, items, targets, tuple(sample.key for sample in samples), tokens)

    def _users(self, samples: Sequence[Sample]) -> SideBatch:
        prompts = [Encoded(sample.tokens_T, sample.marks) for sample in samples]
        vectors = {name: np.stack([sample.vectors[name] for sample in samples]) for name in self.sources}
        return side_batch(prompts, vectors, self.model.user, self.prompts.tokenizer.filler)

    def _items_of(self, rows: npt.NDArray[np.int64], draws_b: npt.NDArray[np.float64]) -> SideBatch:
        there_b11 = (draws_b >= self.id_dropout)[:, None, None]
        vectors = {name: source.items_NE[rows][:, None] * there_b11 for name, source in self.sources.items()}
        prompts = [self._item(row) for row in rows.tolist()]
        return side_batch(prompts, vectors, self.model.item, self.prompts.tokenizer.filler)


def _states(states: list[npt.NDArray[np.floating]]) -> torch.Tensor:
    """(b, L, D) in float32 from b arrays (L, D)."""
    return torch.from_numpy(np.stack(states).astype(np.float32))


def _padded(histories: list[npt.NDArray[np.int32]]) -> torch.Tensor:
    """(b, H), padded with -1."""
    result = np.full((len(histories), max(map(len, histories))), -1, np.int64)
    for row, history in enumerate(histories):
        result[row, : len(history)] = history
    return torch.from_numpy(result)
