"""`--to onnx`: from the newest items of a history to the vector that is searched for, as one ONNX graph.

Shape letters: B users, T positions of a prompt, S positions of a history, H titles, K vectors of a user, E source
dimension, F size of the fused vectors.
"""

import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rarec.bundle.parts import Parts
from rarec.ids.source import HistoryRule, MappedUsers, SequenceUsers, Source
from rarec.models.encode import Encoder
from rarec.models.towers import RaRec, SideBatch, Tower, side_batch
from rarec.prompts import AT_TITLES

Rows = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
OPSET, TOGETHER = 20, 32
"""The version of ONNX's operators; rows that go through a graph together."""


class SourceGraph(nn.Module):
    """User vectors (B, K, E) of one source, from the item rows of histories; its tables are part of it.

    Args:
        source: with user vectors by an ID model or a rule.
    """

    items_NE: Tensor
    read_NE: Tensor
    weights_T: Tensor

    def __init__(self, source: Source) -> None:
        super().__init__()
        users, items_NE = source.users, source.items_NE
        self.map = None
        if isinstance(users, MappedUsers):
            items_NE, matrix_SE = users.items_NS, users.matrix_SE
            self.map = nn.Linear(*matrix_SE.shape)
            weight, bias = torch.from_numpy(matrix_SE.T.copy()), torch.from_numpy(users.bias_E.copy())
            self.map.load_state_dict({"weight": weight, "bias": bias})
            users = users.inner
        self.register_buffer("read_NE", torch.from_numpy(np.array(items_NE, np.float32)))
        own = self.read_NE if items_NE is source.items_NE else torch.from_numpy(np.array(source.items_NE, np.float32))
        self.register_buffer("items_NE", own)  # once, where it is the table that is read
        self.model = users.model.float().eval() if isinstance(users, SequenceUsers) else None
        if isinstance(users, HistoryRule):
            self.register_buffer("weights_T", torch.from_numpy(users.weights_T.astype(np.float32)))

    def forward(self, rows_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the vectors; zeros for an empty history.

        Args:
            rows_BS: item rows, oldest first, padded on the right.
            lengths_B: number of items of each history.
        """
        if self.model is None or self.map is not None:  # a rule, and another model than the alignment's
            rows_BS, lengths_B = self._known(rows_BS, lengths_B)
        users_BKE = self._users(rows_BS, lengths_B)
        if self.map is not None:
            users_BKE = self.map(users_BKE)
        return users_BKE * (lengths_B > 0)[:, None, None]

    def _known(self, rows_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the items of each history that have a vector, and how many there are."""
        length = rows_BS.shape[1]
        known_BS = (self.read_NE[rows_BS] != 0).any(-1) & (torch.arange(length) < lengths_B[:, None])
        at_BS = torch.where(known_BS, known_BS.long().cumsum(1) - 1, length)  # the unknown go to the end
        known_rows_BS = nn.functional.pad(torch.zeros_like(rows_BS), (0, 1)).scatter(1, at_BS, rows_BS)[:, :-1]
        return known_rows_BS, known_BS.sum(1)

    def _users(self, rows_BS: Tensor, lengths_B: Tensor) -> Tensor:
        most = len(self.weights_T) if self.model is None else self.model.max_history
        rows_BS, lengths_B = _newest(rows_BS, lengths_B, most)
        vectors_BSE = self.read_NE[rows_BS]
        age_BS = lengths_B[:, None] - 1 - torch.arange(most)
        if self.model is not None:
            states_BSKE: Tensor = self.model(vectors_BSE, lengths_B)
            return states_BSKE.masked_fill((age_BS != 0)[:, :, None, None], 0).sum(1)
        weights_BS = self.weights_T[age_BS.clamp(min=0)] * (age_BS >= 0)
        weights_BS = weights_BS / weights_BS.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.einsum("bs,bse->be", weights_BS, vectors_BSE)[:, None]


def _newest(rows_BS: Tensor, lengths_B: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the newest items of each history alone, (B, most), and how many there are."""
    start_B1 = (lengths_B - most).clamp(min=0)[:, None]
    at_BS = (start_B1 + torch.arange(most)).clamp(max=rows_BS.shape[1] - 1)
    return rows_BS.gather(1, at_BS), lengths_B.clamp(max=most)


class QueryGraph(nn.Module):
    """The searched vectors (B, K, F): those of all dense parts, side by side, in float32.

    Its inputs are integers, padded with -1 on the right: `history` (B, S), item rows, oldest first; `input_ids` (B, T),
    the prompt, with one column of padding or more; `slot_positions`, -1 for slots at titles that the history lacks;
    `titles` (B, H), the items of the titles, where they have slots.

    Args:
        parts: of the bundle; its model becomes float32.

    Raises:
        UserError: the row has no dense form.
    """

    prompt_inputs: ClassVar[tuple[str, ...]] = ("input_ids", "slot_positions")
    encoder: Encoder  # of a row with a variant alone, as `model` is
    model: RaRec

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        facts = parts.bundle.facts
        self.dense = tuple(parts.dense.row.dense)
        variant = facts["model"]["variant"]["name"] if facts["model"] else None
        self.variant = variant if variant in self.dense else None
        self.id_model = facts["id_model"]
        self.taken = taken(parts.encoder.model.user) if self.variant else []
        self.at_titles = tuple(name for name in self.taken if name.endswith(AT_TITLES))
        wanted = {name.removesuffix(AT_TITLES) for name in self.taken}
        self.names = tuple(sorted(wanted | ({self.id_model} if "id" in self.dense else set())))
        self.sources = nn.ModuleList(SourceGraph(parts.bundle.sources[name]) for name in self.names)
        if self.variant:
            self.encoder = parts.encoder
            self.model = parts.encoder.model.float()
        self.eval().requires_grad_(False)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        prompt = self.prompt_inputs if self.variant else ()
        return ["history", *prompt, *(["titles"] if self.at_titles else [])]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the vectors; see `inputs`."""
        given, vectors = self.read(*inputs)
        parts = [self._part(name, vectors, given) for name in self.dense]
        most = max(part.shape[1] for part in parts)
        return torch.cat([part.expand(-1, most, -1) for part in parts], 2)

    def read(self, *inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the inputs by name, and the user vectors of every source (B, K, E)."""
        given = dict(zip(self.inputs, inputs, strict=True))
        rows_BS = given["history"].clamp(min=0)
        lengths_B = (given["history"] >= 0).sum(1)
        vectors = {name: graph(rows_BS, lengths_B) for name, graph in zip(self.names, self.sources, strict=True)}
        return given, vectors

    def _part(self, name: str, vectors: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        if name == "id":
            return vectors[self.id_model]
        if name != self.variant:  # popularity, and whether an item is new
            return torch.ones_like(given["history"][:, :1, None], dtype=torch.float32)
        encoded: Tensor = self.encode(self.slots(vectors, given), given)
        return encoded[:, None]

    def slots(self, vectors: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the vectors that the alignment takes, (B, K, E) of each source; zeros where there are none."""
        slots = {source: vectors[source] for source in self.taken if source in vectors}
        for source in self.at_titles:
            graph = self.sources[self.names.index(source.removesuffix(AT_TITLES))]
            rows_BH = given["titles"]
            slots[source] = cast(SourceGraph, graph).items_NE[rows_BH.clamp(min=0)] * (rows_BH >= 0)[:, :, None]
        return slots

    def encode(self, slots: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """Return the variant's vectors (B, Z)."""
        ids_BT, positions_BK = given["input_ids"], given["slot_positions"]
        mask_BT = (ids_BT >= 0).long()
        ids_BT = torch.where(ids_BT < 0, self.encoder.prompts.tokenizer.filler, ids_BT)
        positions_BK = torch.where(positions_BK < 0, ids_BT.shape[1] - 1, positions_BK)
        batch = SideBatch(ids_BT, mask_BT, positions_BK, slots)
        vectors_BZ: Tensor = self.model({"user": batch})["user"].vectors_BZ
        return vectors_BZ

    def inputs_of(self, histories: Sequence[Rows], **others: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs for some histories; `others` are those that come from elsewhere."""
        given = {"history": padded(histories), **others}
        if self.variant:
            prompts = [self.encoder.prompts.user(history) for history in histories]
            batch = side_batch(prompts, {}, self.model.user, self.encoder.prompts.tokenizer.filler)
            ids_BT = nn.functional.pad(batch.ids_BT.masked_fill(batch.mask_BT == 0, -1), (0, 1), value=-1)
            missing_BK = ids_BT.gather(1, batch.positions_BK) < 0
            given |= {"input_ids": ids_BT, "slot_positions": batch.positions_BK.masked_fill(missing_BK, -1)}
            most = self.encoder.prompts.config.max_history
            given["titles"] = padded([prompt.titles_H for prompt in prompts], most)
        return tuple(given[name] for name in self.inputs)


def taken(tower: Tower) -> list[str]:
    """Return the sources that a tower's alignment takes, for slots of the prompt or at the readout alone."""
    return [name for name, _ in tower.alignment.named_sources()] if tower.alignment is not None else []


class ItemGraph(nn.Module):
    """An item's vector by the variant, from its prompt and its vectors of each source (zeros where it has none)."""

    def __init__(self, model: RaRec, sources: Collection[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(name for name in taken(model.item) if name in sources)
        self.eval().requires_grad_(False)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return ["input_ids", "attention_mask", "slot_positions", *(f"vectors_{name}" for name in self.names)]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the vectors, (B, Z), from token ids, mask, positions of slots, and the vectors of each source."""
        ids_BT, mask_BT, positions_BK, *vectors = inputs
        batch = SideBatch(ids_BT, mask_BT, positions_BK, dict(zip(self.names, vectors, strict=True)))
        encoded: Tensor = self.model({"item": batch})["item"].vectors_BZ
        return encoded


def padded(lists: Sequence[npt.NDArray[np.integer]], width: int = 1) -> Tensor:
    """Return lists of rows as one table, with -1 on the right; of the width of the longest, or of `width` if more."""
    table = np.full((len(lists), max(width, *map(len, lists))), -1, np.int64)
    for row, values in enumerate(lists):
        table[row, : len(values)] = values
    return torch.from_numpy(table)


def write_graph(module: QueryGraph | ItemGraph, inputs: tuple[Tensor, ...], output: str, path: Path) -> Float32:
    """Trace a module, and write it as ONNX, whose batch and lengths are free; return what it computes.

    Args:
        module: in evaluation mode, on the CPU.
        inputs: of two rows or more.
        output: name of the output.
        path: to write.
    """
    lengths = {"history", "input_ids", "attention_mask"}
    free = [dict.fromkeys(range(2 if name in lengths else 1), torch.export.Dim.DYNAMIC) for name in module.inputs]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it counts the packages that it can do without
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = tuple(tensor[:4] for tensor in inputs)
        traced = torch.export.export(module, example, dynamic_shapes=(tuple(free),), strict=False)
        written = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=module.inputs,
            output_names=[output],
        )
        assert written is not None
        written.save(str(path))
    return run_graph(path, module.inputs, inputs)


def run_graph(path: Path, names: Sequence[str], inputs: Sequence[Tensor]) -> Float32:
    """Return the output of a graph that was written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    used = {graph_input.name for graph_input in session.get_inputs()}
    given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True) if name in used}
    chunks = (slice(start, start + TOGETHER) for start in range(0, len(inputs[0]), TOGETHER))
    outputs = [session.run(None, {name: table[chunk] for name, table in given.items()})[0] for chunk in chunks]
    return np.concatenate(outputs)


def difference(vectors: Float32, expected: Float32) -> float:
    """Return the largest difference of two tables of vectors, relative to the length of the second's."""
    lengths = np.linalg.norm(expected, axis=-1, keepdims=True)
    return float(np.abs((vectors - expected) / np.maximum(lengths, 1e-6)).max())
