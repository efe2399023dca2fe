"""`--to onnx`: the graphs, and what a client needs to call them without a tokenizer: its prompts as token ids."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.bundle.bundle import MODEL
from rarec.bundle.parts import Parts, sample_histories
from rarec.config.neighbours import built_in
from rarec.export import CATALOGUE, ITEM, ORDER, TABLES, TOKENIZER, Target, raise_if_far
from rarec.export.formats import ExactLists, K, add_facts
from rarec.export.graphs import ItemGraph, QueryGraph, difference, run_graph, write_graph
from rarec.models.build import slots_reserved
from rarec.models.towers import side_batch
from rarec.neighbours import scores
from rarec.prompts import Encoded, PromptPair, lay_out
from rarec.prompts.hybrid import Marks
from rarec.ranking import order

Float32 = npt.NDArray[np.float32]
QUERY, INT8, TITLES = "query.onnx", "query.int8.onnx", "titles.parquet"
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
    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`."""
        histories = sample_histories(parts, CHECKED)
        expected = parts.dense.users(histories)
        graph = QueryGraph(parts)
        inputs = graph.inputs_of(histories)
        queries = write_graph(graph, inputs, "query", directory / QUERY)
        figures: dict[str, Any] = {"query_difference": difference(queries, expected)}
        model = parts.bundle.facts["model"]
        if not model or model["llm"]["dtype"] == "float32":  # a bundle that computes in fewer bits is further away
            raise_if_far("query_difference", figures["query_difference"], CLOSE)
        if self.int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(str(directory / QUERY), str(directory / INT8), weight_type=QuantType.QInt8)
            exact, items_NF = ExactLists.of(parts), parts.dense.items_NF
            rounded = run_graph(directory / INT8, graph.inputs, graph.inputs_of(exact.histories))
            overlap = exact.overlap(lambda query_VF, k: (-query_VF @ items_NF.T).argsort(1)[:, :k], rounded)
            figures["int8"] = {f"overlap@{K}": overlap, "measured_on": exact.users}
        copy_client(directory)
        item = None
        if graph.variant:
            item_graph = ItemGraph(parts.encoder.model, graph.encoder.sources)
            figures["item_difference"] = _write_item(parts, item_graph, directory / ITEM)
            graph.encoder.prompts.tokenizer.save(directory / TOKENIZER)
            item = _item_facts(parts, item_graph.names)
        add_facts(directory, prompt=write_prompts(graph, directory), recommender=_write_parts(parts, item, directory))
        return figures


def copy_client(directory: Path) -> None:
    """Copy the client into a folder, and the formulas that it shares with rarec."""
    copy_beside(directory, CLIENT)
    for path in (Path(scores.__file__), Path(order.__file__)):
        shutil.copyfile(path, directory / f"rarec_{path.name}")


def copy_beside(directory: Path, *names: str) -> None:
    """Copy programs that run without rarec into a folder."""
    for name in names:
        shutil.copyfile(Path(__file__).with_name(name), directory / name)


def _write_parts(parts: Parts, item: Mapping[str, Any] | None, directory: Path) -> dict[str, Any]:
    """Write the catalogue and the single parts; return the facts that a recommender needs of them."""
    bundle, row = parts.bundle, parts.row
    bundle.catalogue.write(directory / CATALOGUE)
    tables: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for name, part in row.parts.items():
        given = {"vectors": part.vectors_NZ, "lacking": part.lacking_N}
        tables |= {f"{name}/{field}": table for field, table in given.items() if table is not None}
        facts[name] = {key: getattr(part, key) for key in ("title", "weight", "new_weight")}
    np.savez(directory / TABLES, **tables)
    if row.order is not None:
        np.savez(directory / ORDER, **vars(row.order))
    return {
        "parts": facts,
        "compared": row.compared,
        "date": bundle.date,
        "words": {name: {"untitled": row.untitled, "top": row.top} for name in row.new_items(bundle.catalogue)},
        "reads_llm": [name for name in row.tables if (model := built_in(name)) and model.reads_llm],
        "item": item,
    }


def _item_facts(parts: Parts, sources: Sequence[str]) -> dict[str, Any]:
    """Return what it takes to make an item's prompt, and which vectors of sources the graph takes."""
    bundle, encoder = parts.bundle, parts.encoder
    tokenizer = encoder.prompts.tokenizer
    plain = {name: getattr(tokenizer, name).tolist() for name in ("prefix", "suffix")}
    return {
        "prompt": bundle.config.prompt.model_dump(mode="json"),
        "tokenizer": {**plain, "filler": tokenizer.filler, "adds_space": tokenizer.adds_space},
        "slots": slots_reserved(bundle.config, bundle.shapes),
        "context_length": parts.model.context_length,
        "kind": bundle.facts["model"]["llm"]["kind"],
        "counts": dict(encoder.model.item.slots),
        "sources": {name: encoder.sources[name].dim for name in sources},
    }


def _write_item(parts: Parts, graph: ItemGraph, path: Path) -> float:
    """Write the item graph; return how far it is from the bundle's vectors."""
    encoder = parts.encoder
    model, sources = encoder.model, encoder.sources
    rows = np.arange(min(CHECKED, len(encoder.prompts.titles)))
    vectors = {name: sources[name].items_NE[rows][:, None] for name in graph.names}
    prompts = [encoder.prompts.item(int(row)) for row in rows]
    batch = side_batch(prompts, vectors, model.item, encoder.prompts.tokenizer.filler)
    inputs = (batch.ids_BT, batch.mask_BT, batch.positions_BK, *(batch.vectors[name] for name in graph.names))
    return difference(write_graph(graph, inputs, "vector", path), parts.bundle.vectors[MODEL][rows])


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
    if not graph.variant:
        return NO_PROMPT
    prompts, counts = graph.encoder.prompts, graph.encoder.model.user.slots
    around = prompts.around_history()
    filler = prompts.tokenizer.filler
    ends = np.cumsum(list(counts.values())).tolist()
    places = {name: range(end - counts[name], end) for name, end in zip(counts, ends, strict=True) if counts[name]}
    at_titles = [name for name, mark in around.marks.items() if name in places and isinstance(mark, list)]
    fixed = {name: slots for name, slots in places.items() if name not in at_titles}
    facts = _around_history(prompts, *_laid_out(around, fixed, filler))
    facts["empty"], facts["empty_slots"] = _laid_out(prompts.user([]), fixed, filler)
    _write_titles(prompts, bool(graph.at_titles), directory / TITLES)
    return {
        **facts,
        "bare_after": _bare_after(prompts, **facts),
        "titles_first": [places[name].start for name in at_titles],
        "count": sum(map(len, places.values())),
        "most": prompts.max_titles,
        "room": prompts.user_prompt.room,
        "newest_first": prompts.newest_first,
    }


def _laid_out(encoded: Encoded, places: Mapping[str, range], filler: int) -> tuple[list[int], list[list[int]]]:
    """Return the token ids of a prompt with fillers at slots, and of each slot its place among all slots and its index.

    Args:
        encoded: the prompt.
        places: of the slots of each source, among all slots.
        filler: token id at slots.
    """
    laid = lay_out([encoded], {name: len(slots) for name, slots in places.items()}, filler)
    order = (place for slots in places.values() for place in slots)
    pairs = zip(order, laid.positions_BK[0].tolist(), strict=True)
    return laid.ids_BT[0].tolist(), sorted(map(list, pairs), key=itemgetter(1))


def _around_history(prompts: PromptPair, ids: list[int], slots: list[list[int]]) -> dict[str, Any]:
    """Return what is before and after the history in a prompt whose history is one token."""
    indices = {index for _, index in slots}
    history = [index for index in range(len(ids) + 1) if index not in indices][prompts.user_prompt.start]
    behind = history + bool(prompts.max_titles)
    return {
        "before": ids[:history],
        "before_slots": [[place, index] for place, index in slots if index < history],
        "after": ids[behind:],
        "after_slots": [[place, index - behind] for place, index in slots if index >= behind],
    }


def _bare_after(prompts: PromptPair, after: list[int], after_slots: list[list[int]], **_: Any) -> list[int]:
    """Return `after` for titles without words: if the template has none either, the text is a full stop."""
    tokenizer = prompts.tokenizer
    first = len(after_slots)
    if prompts.user_prompt.start > len(tokenizer.prefix) or len(after) - first > len(tokenizer.suffix):
        return after
    return [*after[:first], *tokenizer(".")[:1].tolist(), *after[first:]]


def _write_titles(prompts: PromptPair, with_slots: bool, path: Path) -> None:
    """Write the tokens of every item's title, as the `first` of a history and as a `later` one.

    Beside them, `first_slots` and `later_slots` are the indices of the slots there, for each source that has slots at
    titles. A title that is longer than the room is cut, as it is in a prompt.
    """
    room = prompts.user_prompt.room
    columns: dict[str, list[list[int]]] = {name: [] for name in ("first", "first_slots", "later", "later_slots")}
    for item in range(len(prompts.titles)):
        for name in ("first", "later"):
            tokens_T, all_marks = prompts.title(item, name == "first")
            marks = all_marks if with_slots else []
            kept_T = tokens_T[: max(0, room - len(marks))]
            named: Marks = {f"{place}": min(mark, len(kept_T)) for place, mark in enumerate(marks)}
            laid = lay_out([Encoded(kept_T, named)], dict.fromkeys(named, 1), prompts.tokenizer.filler)
            columns[name].append(laid.ids_BT[0].tolist())
            columns[f"{name}_slots"].append(laid.positions_BK[0].tolist())
    lists = pa.list_(pa.int32())
    table = pa.table({name: pa.array(column, lists) for name, column in columns.items()})
    pq.write_table(table, path, compression="zstd")
