"""The items and users that alignment diagnostics look at: few, at random, fixed by the seed; never the test targets.

Shape letters: N items or users, K vectors of a source, E source dimension, B of a batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rarec.data.dataset import PreparedDataset
from rarec.ids.source import Source
from rarec.models.encode import Vectors, side_batch
from rarec.models.towers import SideBatch, Tower
from rarec.prompts import Encoded, PromptPair
from rarec.ranking import EvalBatch

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
