"""`--to onnx`: the graphs, and what a client needs to call them without a tokenizer: its prompts as token ids."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.bundle.bundle import MODEL
from rarec.bundle.parts import Parts, sample_histories
from rarec.errors import UserError
from rarec.export import Target
from rarec.export.graphs import ItemGraph, QueryGraph, difference, run_graph, taken, write_graph
from rarec.export.tables import add_facts
from rarec.models.towers import side_batch
from rarec.neighbours import scores
from rarec.prompts import PromptPair

Float32 = npt.NDArray[np.float32]
QUERY, INT8, ITEM, TOKENIZER, TITLES = (
    "query.onnx",
    "query.int8.onnx",
    "item.onnx",
    "tokenizer.json",
    "titles.parquet",
)
CLIENT = "rarec_client.py"
CHECKED = 64
"""Histories for which a graph is compared with the bundle."""
CLOSE = 1e-4
"""Largest difference between a graph's vectors and the bundle's, relative to their length."""
NO_PROMPT = {"empty": [], "empty_slots": [], "count": 0, "most": 0}
"""Of a row without a language model."""


@dataclass(frozen=True)
class Onnx(Target):
    """A graph from a history to the query, one from an item's prompt to its vector, and a client.

    Attributes:
        int8: write the query in 8-bit integers as well.
    """

    int8: bool = False
    needs = ("vectors",)

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`."""
        histories = sample_histories(parts, CHECKED)
        expected = queries_of(parts, histories)
        graph = QueryGraph(parts)
        inputs = graph.inputs_of(histories)
        queries = write_graph(graph, inputs, "query", directory / QUERY)
        figures: dict[str, Any] = {"query_difference": difference(queries, expected)}
        if figures["query_difference"] > CLOSE and not _computes_in_fewer_bits(parts):
            problem = f"the ONNX graph differs from the bundle by {figures['query_difference']:.1e}"
            raise UserError(problem, "report it: this is a bug")
        if self.int8:
            _quantise(directory / QUERY, directory / INT8)
            rounded = run_graph(directory / INT8, graph.inputs, inputs)
            figures["int8"] = _agreement(rounded, expected, parts.dense.items_NF)
        copy_client(directory)
        if graph.encoder is not None:
            figures["item_difference"] = _write_item(parts, directory / ITEM)
            graph.encoder.prompts.tokenizer.save(directory / TOKENIZER)
        add_facts(directory, prompt=write_prompts(graph, directory))
        return figures


def copy_client(directory: Path) -> None:
    """Copy the client into a folder, and the formula that it shares with rarec."""
    copy_beside(directory, CLIENT)
    shutil.copyfile(scores.__file__, directory / "rarec_scores.py")


def copy_beside(directory: Path, *names: str) -> None:
    """Copy programs that run without rarec into a folder."""
    for name in names:
        shutil.copyfile(Path(__file__).with_name(name), directory / name)


def queries_of(parts: Parts, histories: Sequence[npt.NDArray[np.int64]]) -> Float32:
    """Return the bundle's vectors, (B, K, F)."""
    users = parts.dense.users(histories)
    return users.reshape(len(users), -1, users.shape[-1])


def _computes_in_fewer_bits(parts: Parts) -> bool:
    """Return whether the bundle's model computes in fewer bits than the graph, so that their vectors differ."""
    model = parts.bundle.facts["model"]
    return bool(model) and model["llm"]["dtype"] != "float32"


def _agreement(queries: Float32, expected: Float32, items_NF: Float32) -> dict[str, float]:
    """Return the share of the 10 best items by inner product that two queries share, and the same first item."""
    k = min(10, len(items_NF))
    own, other = (
        np.argsort(-(users @ items_NF.T).max(1), axis=1, kind="stable")[:, :k] for users in (queries, expected)
    )
    shared = [len(np.intersect1d(*rows)) / k for rows in zip(own, other, strict=True)]
    return {"overlap@10": float(np.mean(shared)), "same_first": float((own[:, 0] == other[:, 0]).mean())}


def _quantise(path: Path, to: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(path), str(to), weight_type=QuantType.QInt8)


def _write_item(parts: Parts, path: Path) -> float:
    """Write the item graph; return how far it is from the bundle's vectors."""
    encoder = parts.encoder
    model, sources = encoder.model, encoder.sources
    graph = ItemGraph(model, [name for name in taken(model.item) if name in sources])
    rows = np.arange(min(CHECKED, len(encoder.prompts.titles)))
    vectors = {name: sources[name].items_NE[rows][:, None] for name in graph.names}
    prompts = [encoder.prompts.item(int(row)) for row in rows]
    batch = side_batch(prompts, vectors, model.item, encoder.prompts.tokenizer.filler)
    inputs = (batch.ids_BT, batch.mask_BT, batch.positions_BK, *(batch.vectors[name] for name in graph.names))
    return difference(write_graph(graph, inputs, "vector", path), parts.bundle.vectors[MODEL][rows])


@dataclass(frozen=True)
class _Stretch:
    """A part of a prompt that is the same for all users.

    Attributes:
        tokens: its token ids.
        groups: of each source with slots here, the token before which they are, and their places among all slots.
    """

    tokens: list[int]
    groups: list[tuple[int, range]]

    def with_slots(self, filler: int) -> tuple[list[int], list[list[int]]]:
        """Return the token ids with fillers at slots, and of each slot its place among all slots and its index here."""
        slots = list[list[int]]()
        text = list[int]()
        for index in range(len(self.tokens) + 1):
            for mark, places in self.groups:
                if mark == index:
                    slots += [[place, len(text) + number] for number, place in enumerate(places)]
                    text += [filler] * len(places)
            text += self.tokens[index : index + 1]
        return text, slots


def write_prompts(graph: QueryGraph, directory: Path) -> dict[str, Any]:
    """Write the tokens of all titles; return how a client builds a user's prompt of them.

    | field | meaning |
    | --- | --- |
    | `before`, `after`, `empty` | token ids around the history, and of a prompt without history; fillers at slots |
    | `bare_after` | `after` where no title has a word, and a full stop stands for the text |
    | `before_slots`, `after_slots`, `empty_slots` | pairs: place of a slot among all slots, its index there |
    | `titles_first` | place of the first slot at titles, for each source that has them |
    | `count`, `most`, `room` | number of slots; most titles; most tokens of a history, slots included |
    | `newest_first` | order of the titles |

    Args:
        graph: the query, whose tower says how many slots each source has.
        directory: to write `titles.parquet` to.
    """
    if graph.encoder is None:
        return NO_PROMPT
    prompts = graph.encoder.prompts
    counts = graph.encoder.model.user.slots
    ends = np.cumsum(list(counts.values())).tolist()
    places = {name: range(end - counts[name], end) for name, end in zip(counts, ends, strict=True) if counts[name]}
    filler = prompts.tokenizer.filler
    stretches = _stretches(prompts, places)
    facts: dict[str, Any] = {}
    for name, stretch in stretches.items():
        facts[name], facts[f"{name}_slots"] = stretch.with_slots(filler)
    facts["bare_after"] = _bare(prompts, stretches["after"]).with_slots(filler)[0]
    around = prompts.around_history()
    at_titles = [name for name, mark in around.marks.items() if name in places and isinstance(mark, list)]
    _write_titles(prompts, bool(graph.at_titles), directory / TITLES)
    return facts | {
        "titles_first": [places[name].start for name in at_titles],
        "count": sum(map(len, places.values())),
        "most": prompts.max_titles,
        "room": prompts.user_prompt.room,
        "newest_first": prompts.newest_first,
    }


def _stretches(prompts: PromptPair, places: Mapping[str, range]) -> dict[str, _Stretch]:
    """Return what is before and after the history, and the prompt without history."""
    around = prompts.around_history()
    empty = prompts.user([])
    tokens = around.tokens_T.tolist()
    start = prompts.user_prompt.start
    marks = {name: mark for name, mark in around.marks.items() if name in places and isinstance(mark, int)}
    before = [(mark, places[name]) for name, mark in marks.items() if mark <= start]
    after = [(mark - start - 1, places[name]) for name, mark in marks.items() if mark > start]
    alone = [(mark, places[name]) for name, mark in empty.marks.items() if name in marks and isinstance(mark, int)]
    return {
        "before": _Stretch(tokens[:start], before),
        "after": _Stretch(tokens[start + bool(prompts.max_titles) :], after),  # one token stands for the titles
        "empty": _Stretch(empty.tokens_T.tolist(), alone),
    }


def _bare(prompts: PromptPair, after: _Stretch) -> _Stretch:
    """Return `after` with what stands for the text of a prompt that has none."""
    tokenizer = prompts.tokenizer
    if prompts.user_prompt.start > len(tokenizer.prefix) or len(after.tokens) > len(tokenizer.suffix):
        return after  # the template has words
    return _Stretch([*tokenizer(".")[:1].tolist(), *after.tokens], after.groups)


def _write_titles(prompts: PromptPair, with_slots: bool, path: Path) -> None:
    """Write the tokens of every item's title, as the `first` of a history and as a `later` one.

    Beside them, `first_slots` and `later_slots` are the indices of the slots there, for each source that has slots at
    titles. A title that is longer than the room is cut, as it is in a prompt.
    """
    room = prompts.user_prompt.room
    columns: dict[str, list[list[int]]] = {name: [] for name in ("first", "first_slots", "later", "later_slots")}
    for item in range(len(prompts.titles)):
        for name in ("first", "later"):
            tokens, marks = prompts.title(item, name == "first")
            marks = marks if with_slots else []
            kept = tokens.tolist()[: max(0, room - len(marks))]
            groups = [(min(mark, len(kept)), range(place, place + 1)) for place, mark in enumerate(marks)]
            text, slots = _Stretch(kept, groups).with_slots(prompts.tokenizer.filler)
            columns[name].append(text)
            columns[f"{name}_slots"].append([index for _, index in sorted(slots)])
    lists = pa.list_(pa.int32())
    table = pa.table({name: pa.array(column, lists) for name, column in columns.items()})
    pq.write_table(table, path, compression="zstd")
