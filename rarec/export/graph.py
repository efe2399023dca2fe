"""`--to onnx`: from the newest items of a history to the vector that is searched for, as one ONNX graph.

Shape letters: B users, T positions of a prompt, S positions of a history, H titles, K vectors of a user, E source
dimension, F size of the fused vectors.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rarec.bundle.parts import Parts
from rarec.errors import UserError
from rarec.ids.mapped import MappedUsers
from rarec.ids.source import GraphUsers, HistoryRule, SequenceUsers, Source
from rarec.models.encode import Encoder, side_batch
from rarec.models.towers import RaRec, SideBatch, Tower
from rarec.prompts import AT_TITLES

Rows = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
QUERY, ITEM = "query.onnx", "item.onnx"
OPSET = 20


class SourceGraph(nn.Module):
    """User vectors (B, K, E) of one source, from the item rows of histories; its tables are part of it.

    Args:
        source: with user vectors by an ID model, a rule or the graph.
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
        table = users.left_NE if isinstance(users, GraphUsers) else items_NE
        self.register_buffer("read_NE", torch.from_numpy(np.array(table, np.float32)))
        own = self.read_NE if table is source.items_NE else torch.from_numpy(np.array(source.items_NE, np.float32))
        self.register_buffer("items_NE", own)  # once, where it is the table that is read
        rule = users.rule if isinstance(users, GraphUsers) else users
        self.model = users.model.float().eval() if isinstance(users, SequenceUsers) else None
        if isinstance(rule, HistoryRule):
            self.register_buffer("weights_T", torch.from_numpy(rule.weights_T.astype(np.float32)))

    def forward(self, rows_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the vectors; zeros for an empty history.

        Args:
            rows_BS: item rows, oldest first, padded on the right.
            lengths_B: number of items of each history.
        """
        if self.map is None:
            return self._users(rows_BS, lengths_B)
        known_BS = (self.read_NE[rows_BS] != 0).any(-1) & (torch.arange(rows_BS.shape[1]) < lengths_B[:, None])
        at_BS = torch.where(known_BS, known_BS.long().cumsum(1) - 1, rows_BS.shape[1])  # the unknown go to the end
        rows_BS = nn.functional.pad(torch.zeros_like(rows_BS), (0, 1)).scatter(1, at_BS, rows_BS)[:, :-1]
        lengths_B = known_BS.sum(1)
        users_BKE: Tensor = self.map(self._users(rows_BS, lengths_B))
        return users_BKE * (lengths_B > 0)[:, None, None]

    def _users(self, rows_BS: Tensor, lengths_B: Tensor) -> Tensor:
        if self.model is not None:
            rows_BS, lengths_B = _newest(rows_BS, lengths_B, self.model.max_history)
            states_BSKE = self.model(self.read_NE[rows_BS], lengths_B)
            last_B111 = (lengths_B - 1).clamp(min=0)[:, None, None, None]
            at_B1KE = last_B111.expand(-1, 1, states_BSKE.shape[2], states_BSKE.shape[3])
            last_BKE: Tensor = states_BSKE.gather(1, at_B1KE)[:, 0]
            return last_BKE * (lengths_B > 0)[:, None, None]
        vectors_BSE = self.read_NE[rows_BS]
        inside_BS = torch.arange(rows_BS.shape[1]) < lengths_B[:, None]
        known_BS = inside_BS & (vectors_BSE != 0).any(-1)
        age_BS = known_BS.long().flip(1).cumsum(1).flip(1) - 1  # among the items with a vector; the newest is 0
        read_BS = known_BS & (age_BS < self.weights_T.shape[0])
        weights_BS = self.weights_T[age_BS.clamp(0, self.weights_T.shape[0] - 1)] * read_BS
        weights_BS = weights_BS / weights_BS.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.einsum("bs,bse->be", weights_BS, vectors_BSE)[:, None]


def _newest(rows_BS: Tensor, lengths_B: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the newest items of each history alone, (B, most), and how many there are."""
    start_B1 = (lengths_B - most).clamp(min=0)[:, None]
    at_BS = (start_B1 + torch.arange(most)).clamp(max=rows_BS.shape[1] - 1)
    return rows_BS.gather(1, at_BS), lengths_B.clamp(max=most)


class QueryGraph(nn.Module):
    """The searched vectors (B, K, F): those of all dense parts, side by side.

    Its inputs are integers, padded with -1 on the right: `history` (B, S), item rows, oldest first; `input_ids` (B, T),
    the prompt, with one column of padding or more; `slot_positions`, -1 for slots at titles that the history lacks;
    `titles` (B, H), the items of the titles, where they have slots.

    Args:
        dense: names of the dense parts, in order.
        sources: the graphs of all sources by name.
        id_model: name of the source that is the part `id`.
        variant: name and model of the variant; None without one.
        filler: token id at padding.
    """

    def __init__(
        self,
        dense: Sequence[str],
        sources: Mapping[str, SourceGraph],
        id_model: str,
        variant: tuple[str, RaRec] | None,
        filler: int = 0,
    ) -> None:
        super().__init__()
        self.filler = filler
        self.dense, self.id_model, self.names = tuple(dense), id_model, tuple(sources)
        self.sources = nn.ModuleList(sources.values())
        self.variant = variant[0] if variant else None
        self.model = variant[1] if variant else None
        self.taken = taken(self.model.user) if self.model is not None else []
        self.at_titles = tuple(name for name in self.taken if name.endswith(AT_TITLES))

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        prompt = ["input_ids", "slot_positions"] if self.model is not None else []
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
        rows_BS, lengths_B = given["history"].clamp(min=0), (given["history"] >= 0).sum(1)
        vectors = {name: graph(rows_BS, lengths_B) for name, graph in zip(self.names, self.sources, strict=True)}
        return given, vectors

    def _part(self, name: str, vectors: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        if name == "id":
            return vectors[self.id_model]
        if name != self.variant:  # popularity
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
        assert self.model is not None
        ids_BT, positions_BK = given["input_ids"], given["slot_positions"]
        mask_BT = (ids_BT >= 0).long()
        ids_BT = torch.where(ids_BT < 0, self.filler, ids_BT)
        positions_BK = torch.where(positions_BK < 0, ids_BT.shape[1] - 1, positions_BK)
        batch = SideBatch(ids_BT, mask_BT, positions_BK, slots)
        vectors_BZ: Tensor = self.model({"user": batch})["user"].vectors_BZ
        return vectors_BZ


def taken(tower: Tower) -> list[str]:
    """Return the sources that a tower's alignment takes, for slots of the prompt or at the readout alone."""
    return [name for name, _ in tower.alignment.named_sources()] if tower.alignment is not None else []


class ItemGraph(nn.Module):
    """An item's vector by the variant, from its prompt and its vectors of each source (zeros where it has none)."""

    def __init__(self, model: RaRec, sources: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(sources)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the vectors, (B, Z), from token ids, mask, positions of slots, and the vectors of each source."""
        ids_BT, mask_BT, positions_BK, *vectors = inputs
        batch = SideBatch(ids_BT, mask_BT, positions_BK, dict(zip(self.names, vectors, strict=True)))
        encoded: Tensor = self.model({"item": batch})["item"].vectors_BZ
        return encoded


def query_graph(parts: Parts, made: type[QueryGraph] = QueryGraph) -> QueryGraph:
    """Return the query of a bundle's row, in float32.

    Args:
        parts: of the bundle.
        made: the class of the graph.

    Raises:
        UserError: the row has no dense form.
    """
    facts, dense = parts.bundle.facts, parts.dense.dense
    with_model = facts["model"] and facts["model"]["variant"]["name"] in dense
    model = parts.encoder.model.float() if with_model else None
    names = taken(model.user) if model is not None else []
    wanted = {name.removesuffix(AT_TITLES) for name in names} | ({facts["id_model"]} if "id" in dense else set())
    sources = {name: SourceGraph(parts.bundle.sources[name]) for name in sorted(wanted)}
    variant = (facts["model"]["variant"]["name"], model) if model is not None else None
    filler = parts.encoder.prompts.tokenizer.filler if model is not None else 0
    return made(list(dense), sources, facts["id_model"], variant, filler).eval().requires_grad_(False)


def query_inputs(graph: QueryGraph, encoder: Encoder | None, histories: Sequence[Rows]) -> tuple[Tensor, ...]:
    """Return the graph's inputs for some histories."""
    given = [padded(histories)]
    if graph.model is None or encoder is None:
        return tuple(given)
    prompts = [encoder.prompts.user(history) for history in histories]
    batch = side_batch(prompts, {}, graph.model.user, encoder.prompts.tokenizer.filler)
    ids_BT = nn.functional.pad(batch.ids_BT.masked_fill(batch.mask_BT == 0, -1), (0, 1), value=-1)
    given += [ids_BT, batch.positions_BK.masked_fill(ids_BT.gather(1, batch.positions_BK) < 0, -1)]
    if graph.at_titles:
        given.append(padded([prompt.titles_H for prompt in prompts], encoder.prompts.config.max_history))
    return tuple(given)


def padded(lists: Sequence[npt.NDArray[np.integer]], width: int = 1) -> Tensor:
    """Return lists of rows as one table, with -1 on the right; of the width of the longest, or of `width` if more."""
    table = np.full((len(lists), max(width, *map(len, lists))), -1, np.int64)
    for row, values in enumerate(lists):
        table[row, : len(values)] = values
    return torch.from_numpy(table)


def write_graph(module: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str], output: str, path: Path) -> None:
    """Trace a module, and write it as ONNX; batch and lengths stay free.

    Args:
        module: in evaluation mode, on the CPU.
        inputs: an example, of two rows or more.
        names: of the inputs.
        output: name of the output.
        path: to write.
    """
    free = [dict.fromkeys(_free(name), torch.export.Dim.DYNAMIC) for name in names]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it counts the packages that it can do without
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.export.export(module, inputs, dynamic_shapes=(tuple(free),), strict=False)
        written = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=list(names),
            output_names=[output],
        )
        assert written is not None
        written.save(str(path))


def _free(name: str) -> range:
    """Return the axes whose size is free: the batch, and the length of texts and histories."""
    return range(2 if name in ("history", "input_ids", "attention_mask") else 1)


def session(path: Path, threads: int = 0) -> Any:
    """Open a graph in ONNX Runtime.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "--to onnx needs the packages onnx, onnxscript, onnxruntime", "pip install 'rarec[serving]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
