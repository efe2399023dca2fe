"""`--to onnx`: the graphs, what a client needs to call them, and the check that they say what the bundle says."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rarec.bundle.parts import Parts
from rarec.bundle.samples import sample_histories
from rarec.errors import UserError
from rarec.export import rarec_client_path
from rarec.export.graph import ItemGraph, QueryGraph, query_graph, query_inputs, session, taken, write_graph
from rarec.export.prompt import NO_PROMPT, TITLES, prompt_facts, write_titles
from rarec.models.encode import side_batch

Float32 = npt.NDArray[np.float32]
QUERY, INT8, ITEM, TOKENIZER = "query.onnx", "query.int8.onnx", "item.onnx", "tokenizer.json"
CHECKED = 64
"""Histories for which a graph is compared with the bundle."""
CLOSE = 1e-4
"""Largest difference between a graph's vectors and the bundle's, relative to their length."""


def write_onnx(parts: Parts, directory: Path, int8: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the graphs; return fields for `client.json`, and figures for the manifest.

    Args:
        parts: of the bundle; its model becomes float32.
        directory: to write to.
        int8: write the query in 8-bit integers as well.

    Raises:
        UserError: ONNX Runtime is not installed; the row has no dense form; a graph differs from the bundle.
    """
    histories = sample_histories(parts, CHECKED)
    expected = queries_of(parts, histories)
    graph = query_graph(parts)
    encoder = parts.encoder if graph.model is not None else None
    inputs = query_inputs(graph, encoder, histories)
    write_graph(graph, tuple(tensor[:4] for tensor in inputs), graph.inputs, "query", directory / QUERY)
    found = run_graph(directory / QUERY, graph, inputs)
    apart = apart_of(found, expected)
    if apart > CLOSE and not rounded(parts):
        raise UserError(f"the ONNX graph differs from the bundle by {apart:.1e}", "report it: this is a bug")
    figures: dict[str, Any] = {"query_difference": apart}
    if int8:
        _quantise(directory / QUERY, directory / INT8)
        figures["int8"] = _agreement(run_graph(directory / INT8, graph, inputs), expected, parts.dense.items_NF)
    shutil.copyfile(rarec_client_path(), directory / "rarec_client.py")
    if graph.model is None or encoder is None:
        return {"prompt": NO_PROMPT}, figures
    prompts, slots = encoder.prompts, graph.model.user.slots
    write_titles(prompts, prompts.frame().encoded.marks if graph.at_titles else {}, directory / TITLES)
    figures["item_difference"] = _write_item(parts, directory / ITEM)
    prompts.tokenizer.save(directory / TOKENIZER)
    return {"prompt": prompt_facts(prompts, slots)}, figures


def queries_of(parts: Parts, histories: Sequence[npt.NDArray[np.int64]]) -> Float32:
    """Return the bundle's vectors, (B, K, F)."""
    users = parts.dense.users(histories)
    return users.reshape(len(users), -1, users.shape[-1])


def run_graph(path: Path, graph: QueryGraph, inputs: tuple[torch.Tensor, ...]) -> Float32:
    """Return the output of a graph that was written."""
    opened = session(path)
    wanted = {each.name for each in opened.get_inputs()}
    given = {name: tensor.numpy() for name, tensor in zip(graph.inputs, inputs, strict=True) if name in wanted}
    found: Float32 = opened.run(None, given)[0]
    return found


def apart_of(found: Float32, expected: Float32) -> float:
    """Return the largest difference of two vectors, relative to the length of the second."""
    lengths = np.linalg.norm(expected, axis=-1, keepdims=True)
    return float(np.abs((found - expected) / np.maximum(lengths, 1e-6)).max())


def rounded(parts: Parts) -> bool:
    """Return whether the bundle's model computes in fewer bits than the graph, so that their vectors differ."""
    model = parts.bundle.facts["model"]
    return bool(model) and model["llm"]["dtype"] != "float32"


def _agreement(found: Float32, expected: Float32, items_NF: Float32) -> dict[str, float]:
    """Return the share of the 10 best items by inner product that two queries share, and the same first item."""
    k = min(10, len(items_NF))
    tops = [np.argsort(-(users @ items_NF.T).max(1), axis=1, kind="stable")[:, :k] for users in (found, expected)]
    shared = [len(set(one) & set(other)) / k for one, other in zip(*tops, strict=True)]
    return {"overlap@10": float(np.mean(shared)), "same_first": float((tops[0][:, 0] == tops[1][:, 0]).mean())}


def _quantise(path: Path, to: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(path), str(to), weight_type=QuantType.QInt8)


def _write_item(parts: Parts, path: Path) -> float:
    """Write the item graph; return how far it is from the bundle's vectors."""
    encoder = parts.encoder
    model, sources = encoder.model, encoder.sources
    names = [name for name in taken(model.item) if name in sources]
    rows = np.arange(min(CHECKED, len(encoder.prompts.titles)))
    vectors = {name: sources[name].items_NE[rows][:, None] for name in names}
    prompts = [encoder.prompts.item(int(row)) for row in rows]
    batch = side_batch(prompts, vectors, model.item, encoder.prompts.tokenizer.filler)
    inputs = (batch.ids_BT, batch.mask_BT, batch.positions_BK, *(batch.vectors[name] for name in names))
    inputs_named = ["input_ids", "attention_mask", "slot_positions", *(f"vectors_{name}" for name in names)]
    module = ItemGraph(model, names).eval().requires_grad_(False)
    write_graph(module, tuple(tensor[:4] for tensor in inputs), inputs_named, "vector", path)
    opened = session(path)
    wanted = {each.name for each in opened.get_inputs()}
    given = {name: tensor.numpy() for name, tensor in zip(inputs_named, inputs, strict=True) if name in wanted}
    return apart_of(opened.run(None, given)[0], parts.bundle.vectors["model"][rows])
