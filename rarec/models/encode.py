"""Encoding the catalogue and users in chunks: prompts, source vectors and a model in, vectors to score out.

Shape letters: N catalogue, B users or items of a chunk, Z size of a scored vector, K vectors of a source, E source
dimension.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from rarec.ids.source import Source
from rarec.models.towers import RaRec, SideBatch, Tower
from rarec.prompts import Encoded, PromptPair, by_length, lay_out
from rarec.world import SINGLE, World

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]
Vectors = Mapping[str, npt.NDArray[np.floating]]


def side_batch(
    prompts: Sequence[Encoded],
    vectors: Vectors,
    tower: Tower,
    filler: int,
) -> SideBatch:
    """Lay prompts out with the tower's slots, as tensors.

    Args:
        prompts: filled prompts (B).
        vectors: for each source, (B, K, E).
        tower: says how many slots each source takes.
        filler: token id for slots and padding.
    """
    laid = lay_out(prompts, tower.slots, filler)
    ids, mask, positions = (torch.from_numpy(a) for a in (laid.ids_BT, laid.mask_BT, laid.positions_BK))
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a, np.float32)) for name, a in vectors.items()}
    return SideBatch(ids, mask, positions, tensors)


def side_batches(
    prompts: Sequence[Encoded], vectors: Vectors, tower: Tower, filler: int, size: int, world: World
) -> Iterator[tuple[bool, Rows, SideBatch]]:
    """Batches of prompts of like length, on the rank's device, each with its rows and whether it is this rank's.

    All ranks come by as often, as models want it that lie in shards; arguments as above, and `size` of a batch.
    """
    for mine, rows in world.split_in_lockstep(by_length(prompts, size)):
        own = {name: array[rows] for name, array in vectors.items()}
        yield mine, rows, side_batch([prompts[row] for row in rows], own, tower, filler).to(world.device)


class Encoder:
    """Encodes with one model; memory depends on the chunk, not on how much there is.

    Args:
        model: the two towers.
        prompts: over the catalogue's titles.
        sources: every source by name.
        batch_size: prompts a chunk.
        world: that encode together. Chunks are the same on any number of them, and each has its share of the chunks.
    """

    def __init__(
        self,
        model: RaRec,
        prompts: PromptPair,
        sources: Mapping[str, Source],
        batch_size: int,
        world: World = SINGLE,
    ) -> None:
        self.model, self.prompts, self.sources = model, prompts, sources
        self.batch_size, self.world = batch_size, world

    def items(self, rows: Rows | None = None) -> Float32:
        """Item vectors (N, Z), of the whole catalogue or of these rows; on every rank all of them."""
        rows = np.arange(len(self.prompts.titles)) if rows is None else rows
        encoded = [self.prompts.item(int(row)) for row in rows]
        vectors = {name: source.items_NE[rows][:, None] for name, source in self.sources.items()}
        return self._chunks("item", self.model.item, encoded, vectors)

    def users(self, rows: Rows, histories: Sequence[Rows]) -> Float32:
        """User vectors (B, Z) after these histories (item rows, oldest first); on every rank all of them."""
        encoded = [self.prompts.user(history) for history in histories]
        vectors = {name: source.user_vectors(rows, histories) for name, source in self.sources.items()}
        return self._chunks("user", self.model.user, encoded, vectors)

    @torch.no_grad()
    def _chunks(self, side: str, tower: Tower, prompts: list[Encoded], vectors: Vectors) -> Float32:
        """Chunks of like length, results in the order asked for."""
        result: Float32 | None = None
        self.world.report(f"encoding {side}s")
        filler = self.prompts.tokenizer.filler
        for mine, chunk, batch in side_batches(prompts, vectors, tower, filler, self.batch_size, self.world):
            encoded_BZ = self.model({side: batch})[side].vectors_BZ.float().cpu().numpy()
            if result is None:
                result = np.zeros((len(prompts), encoded_BZ.shape[1]), np.float32)
            if mine:
                result[chunk] = encoded_BZ
        if result is None:
            raise ValueError("nothing to encode")
        return self.world.all_reduce_sum_(result)
