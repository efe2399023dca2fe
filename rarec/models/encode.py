"""Encode users and items with a model in chunks, and texts with the language model alone.

Shape letters: N items or prompts, B users or items of a chunk, T positions, Z size of a scored vector, K vectors of a
source, E source dimension, L blocks, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from rarec.data.tables import IN_MEMORY, Scratch
from rarec.distributed.world import CPU, SINGLE, World
from rarec.errors import UserError
from rarec.ids.source import Source
from rarec.models.backbone import FrozenBackbone
from rarec.models.language_model import LoadedModel
from rarec.models.towers import RaRec, SideBatch, Tower, Vectors, side_batch, title_vectors
from rarec.prompts import Encoded, PromptPair, by_length, lay_out
from rarec.ranking.rankers import VectorRanker

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.integer]
ITEMS_AT_A_TIME, STATES_AT_A_TIME = 1 << 16, 1 << 12
"""Items whose prompts are held at a time: to encode them, and for their states of several blocks."""
TEXT_TOKENS, TEXTS_AT_A_TIME = 128, 64
"""Of plain texts: the most tokens of one, and the number in a forward pass."""
Split = Callable[[list[list[int]]], Iterator[tuple[bool, list[int]]]]
"""Splits chunks, each a list of prompts, among the ranks: a method of `World`."""


def side_batches(
    prompts: Sequence[Encoded], vectors: Vectors, tower: Tower, filler: int, size: int, world: World
) -> Iterator[tuple[bool, Rows, SideBatch]]:
    """Yield batches of prompts of similar length on the rank's device: (whether it is this rank's, its rows, batch).

    Every rank yields equally often, as a sharded model requires. Arguments as in `side_batch`, and the `size` of a
    batch.
    """
    for mine, rows in world.split_in_lockstep(by_length(prompts, size)):
        own = {name: array[rows] for name, array in vectors.items()}
        yield mine, rows, side_batch([prompts[row] for row in rows], own, tower, filler).to(world.device)


@dataclass(frozen=True)
class Encoder:
    """Encodes users and items with one model. Memory depends on the chunk, not on the number of users or items.

    Vectors of the whole catalogue are kept in memory or in a scratch file.

    Attributes:
        model: the two towers.
        prompts: the prompts over the catalogue's titles.
        sources: every source by name.
        batch_size: prompts in a chunk.
        world: the ranks that encode together. The chunks do not depend on their number; each encodes a share.
        scratch: for the vectors of the catalogue.
    """

    model: RaRec
    prompts: PromptPair
    sources: Mapping[str, Source]
    batch_size: int
    world: World = SINGLE
    scratch: Scratch = IN_MEMORY

    def items(self, rows: Rows | None = None) -> Float32:
        """Return item vectors (N, Z), of the whole catalogue or of these rows; every rank gets all of them."""
        rows = np.arange(len(self.prompts.titles)) if rows is None else rows
        result: Float32 | None = None
        for start in range(0, len(rows), ITEMS_AT_A_TIME):
            part = rows[start : start + ITEMS_AT_A_TIME]
            encoded = [self.prompts.item(int(row)) for row in part]
            vectors = {name: source.items_NE[part][:, None] for name, source in self.sources.items()}
            vectors_BZ = self._encode("item", self.model.item, encoded, vectors)
            result = self.scratch.zeros((len(rows), vectors_BZ.shape[1]), np.float32) if result is None else result
            result[start : start + len(part)] = vectors_BZ
        if result is None:
            raise ValueError("nothing to encode")
        return result

    def users(self, rows: Rows, histories: Sequence[Rows]) -> Float32:
        """Return user vectors (B, Z) after these histories (item rows, oldest first); every rank gets all of them."""
        return self._encode("user", self.model.user, *self.user_inputs(rows, histories))

    def ranker(self) -> VectorRanker:
        """Return a ranker by these vectors, on this rank's device where memory has room for them."""
        items_NZ = self.items()
        fits = items_NZ.nbytes <= self.scratch.bytes
        device, slots = self.world.device if fits else CPU, self.model.item.alignment
        return VectorRanker(items_NZ, self.users, device=device, encode_unmet=self.unmet if slots else None)

    def unmet(self, rows: Rows) -> Float32:
        """Return item vectors (B, Z) of some rows as if no source had vectors of them."""
        nothing = {
            name: replace(source, items_NE=np.broadcast_to(np.float32(0), source.items_NE.shape))
            for name, source in self.sources.items()
        }
        return replace(self, sources=nothing).items(rows)

    def user_inputs(self, rows: Rows, histories: Sequence[Rows]) -> tuple[list[Encoded], Vectors]:
        """Return the prompts of users, and the vectors that their slots take."""
        encoded = [self.prompts.user(history) for history in histories]
        vectors = {name: source.user_vectors(rows, histories) for name, source in self.sources.items()}
        return encoded, {**vectors, **title_vectors(encoded, self.prompts, self.sources)}

    @torch.no_grad()
    def _encode(self, side: str, tower: Tower, prompts: list[Encoded], vectors: Vectors) -> Float32:
        """Encode in chunks of similar length; the result is in the order of `prompts`."""
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


def text_batch(prompts: Sequence[Encoded], filler: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask (B, T) of prompts without slots."""
    laid = lay_out(prompts, {}, filler)
    return torch.from_numpy(laid.ids_BT).to(device), torch.from_numpy(laid.mask_BT).to(device)


def text_vectors(
    llm: LoadedModel, texts: Sequence[str], world: World = SINGLE, scratch: Scratch = IN_MEMORY
) -> Float32:
    """Return the frozen model's pooled final states of plain texts, (N, D); zero for a text without tokens.

    Args:
        llm: without LoRA.
        texts: cut after 128 tokens.
        world: the ranks that encode together.
        scratch: for the result.
    """
    vectors_ND = scratch.zeros((len(texts), llm.backbone.hidden_size), np.float32)
    words = llm.tokenizer
    most = min(TEXT_TOKENS, llm.context_length - len(words.prefix) - len(words.suffix))
    for start in range(0, len(texts), ITEMS_AT_A_TIME):
        pieces = [words(text, most=most) for text in texts[start : start + ITEMS_AT_A_TIME]]
        told = [row for row, piece in enumerate(pieces) if len(piece)]
        prompts = [Encoded(np.concatenate([words.prefix, pieces[row], words.suffix]), {}) for row in told]
        for mine, rows in world.split_in_lockstep(by_length(prompts, TEXTS_AT_A_TIME)):
            batch = text_batch([prompts[row] for row in rows], words.filler, llm.backbone.device)
            states_BD = llm.backbone.final_text_states(*batch).float().cpu().numpy()
            if mine:
                vectors_ND[start + np.array(told)[rows]] = states_BD
        part = slice(start, start + len(pieces))
        vectors_ND[part] = world.all_reduce_sum_(vectors_ND[part])
    return vectors_ND


def text_states(
    backbone: FrozenBackbone,
    prompts: Sequence[Encoded],
    blocks: Sequence[int],
    filler: int,
    *,
    dtype: str = "float16",
    batch_size: int = 64,
    split: Split = SINGLE.in_lockstep,
) -> npt.NDArray[np.floating]:
    """Return text-only states, the pooled hidden states of prompts without slots entering `blocks`, as (N, L, D).

    They are the h~ of docs/method.md, section 4. Prompts with the same tokens are computed once.

    Args:
        backbone: the frozen model; LoRA is switched off.
        prompts: filled prompts.
        blocks: indices of blocks.
        filler: token id for padding.
        dtype: dtype of the result.
        batch_size: prompts in a forward pass.
        split: which chunks this rank computes: `World.in_lockstep` for prompts of its own, `World.split_in_lockstep`
            for a share of prompts that all ranks know; the states of the other prompts are zero then.

    Raises:
        UserError: a state is too large for the dtype.
    """
    texts = [prompt.tokens_T.tobytes() for prompt in prompts]
    first: dict[bytes, int] = {}
    for row, text in enumerate(texts):
        first.setdefault(text, row)
    unique = list(first.values())
    result = np.zeros((len(prompts), len(blocks), backbone.hidden_size), dtype)
    chunks = [[unique[index] for index in chunk] for chunk in by_length([prompts[row] for row in unique], batch_size)]
    for mine, rows in split(chunks):
        ids_BT, mask_BT = text_batch([prompts[row] for row in rows], filler, backbone.device)
        states_LBD = backbone.text_states(ids_BT, mask_BT, blocks).float().cpu().numpy()
        if mine:
            with np.errstate(over="ignore"):
                result[rows] = states_LBD.transpose(1, 0, 2)
    if not np.isfinite(result[unique]).all():
        raise UserError(f"a text-only state overflows {dtype}", "set shards.state_dtype: float32")
    result[:] = result[[first[text] for text in texts]]
    return result
