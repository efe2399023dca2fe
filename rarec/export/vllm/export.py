"""`--to vllm`: a folder that stock vLLM is started by, and a client that sends it histories.

Slots of every block go as a prefix of keys and values (`program`), slots at the input alone as embeddings of a prompt.

Shape letters: N users, L blocks, P positions of the prefix, V vocabulary, D hidden size.
"""

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rarec.bundle.parts import Parts
from rarec.bundle.samples import sample_histories
from rarec.config.paths import resolve
from rarec.errors import UserError
from rarec.export import rarec_client_path
from rarec.export.adapters import write_adapter
from rarec.export.graph import QueryGraph, padded, query_graph, query_inputs, write_graph
from rarec.export.index import write_index
from rarec.export.onnx_files import CLOSE, QUERY, apart_of, queries_of, run_graph
from rarec.export.prompt import TITLES, prompt_facts, write_titles
from rarec.export.tables import FACTS, write_tables
from rarec.export.vllm.graphs import InputSlots, SlotVectors, StateQuery
from rarec.export.vllm.prefix import USE_ONNX, Prefix, cached, write_program
from rarec.export.vllm.program import Program
from rarec.models.backbone import pool_text
from rarec.models.encode import Encoder, side_batch
from rarec.models.slots import Slots
from rarec.models.towers import SideBatch
from rarec.models.weights import LORA
from rarec.storage.files import write_json

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
HERE = Path(__file__).parent
SLOTS, PROGRAM, WORDS, TEMPLATE = "slots.onnx", "program.safetensors", "words.npy", "words.jinja"
CHECK, START = "check.npz", "serve.sh"
CHECKED, ASKED = 64, 8
"""Histories by which the folder is compared with the bundle, and of these by which a client checks its server."""
RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks of LoRA weights that vLLM takes."""


def write_vllm(parts: Parts, directory: Path) -> dict[str, Any]:
    """Write the folder; return figures for the manifest.

    Args:
        parts: of the bundle; its model becomes float32.
        directory: to write to.

    Raises:
        UserError: vLLM cannot serve this bundle without losing what it says.
    """
    encoder = parts.encoder
    _refuse(parts, encoder)
    graph, histories = query_graph(parts, StateQuery), sample_histories(parts, CHECKED)
    states, bare = (_states(encoder, histories, slots) for slots in (True, False))
    at_input = parts.bundle.variant.blocks == "input" and bool(encoder.model.user.slots)
    facts, figures = write_tables(parts, directory), write_index(parts, "flat", directory)
    prompt, pool = prompt_facts(encoder.prompts, encoder.model.user.slots), parts.bundle.config.readout.pool
    marks = encoder.prompts.frame().encoded.marks if graph.at_titles else {}
    write_titles(encoder.prompts, marks, directory / TITLES)
    figures["query_difference"] = _write_graphs(parts, graph, at_input, histories, states, directory)
    if at_input:
        figures["state_difference"] = _write_words(encoder, histories, states, directory)
    else:
        figures["prefix_difference"] = _write_prefix(parts, Prefix.of(prompt, pool), histories, directory)
    lora = (parts.bundle.directory / LORA).is_dir()
    figures |= write_adapter(parts, directory / LORA) if lora else {}
    _compare(figures)
    np.savez(directory / CHECK, histories=padded(histories[:ASKED]).numpy(), states=states[:ASKED], bare=bare[:ASKED])
    served = {"name": "rarec-lora" if lora else "rarec", "pool": pool}
    write_json(directory / FACTS, {**facts, "prompt": prompt, "vllm": served})
    _write_start(parts, at_input, lora, directory / START)
    shutil.copyfile(rarec_client_path(), directory / "rarec_client.py")
    shutil.copyfile(HERE / "client.py", directory / "rarec_vllm.py")
    return figures


def _write_start(parts: Parts, at_input: bool, lora: bool, path: Path) -> None:
    """Write the script that starts vLLM; who may read it may run it."""
    config, model = parts.bundle.config, resolve(parts.llm_path)
    model = str(Path(model).resolve()) if Path(model).exists() else model  # the script runs in its own folder
    longest = config.prompt.max_tokens or parts.context_length
    revision = config.llm.revision if config.llm.revision and not Path(model).exists() else None
    options = {
        "--model": '"$RAREC_LLM"',
        **({"--revision": shlex.quote(revision)} if revision else {}),
        "--served-model-name": "rarec",
        "--runner": "pooling",
        "--convert": "embed",
        "--dtype": config.llm.dtype,
        "--max-model-len": str(longest),
        "--max-num-batched-tokens": str(max(longest, 8192)),  # no text comes in parts
        **(_of_embeddings() if at_input else _of_prefix(config.readout.pool)),
        **({"--lora-modules": "rarec-lora=lora", "--max-lora-rank": str(config.lora.rank)} if lora else {}),
    }
    switches = ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    switches += ["--enable-lora"] * lora + ["--enable-prompt-embeds"] * at_input
    lines = [*(f"{name} {value}" for name, value in options.items()), *switches, '"$@"']
    path.write_text(
        SCRIPT.replace("MODEL", shlex.quote(model))
        + " \\\n  ".join(["exec python -m vllm.entrypoints.openai.api_server", *lines])
        + "\n"
    )
    mode = path.stat().st_mode
    path.chmod(mode | (mode & 0o444) >> 2)


def _of_embeddings() -> dict[str, str]:
    """Return options of a server that takes embeddings; the client pools."""
    return {"--chat-template": TEMPLATE, "--pooler-config": _json({"task": "token_embed", "use_activation": False})}


def _of_prefix(pool: str) -> dict[str, str]:
    """Return options of a server with the connector."""
    connector = {"kv_connector": "SlotConnector", "kv_connector_module_path": "rarec_connector", "kv_role": "kv_both"}
    pooler = {"pooling_type": pool.upper(), "use_activation": False}
    return {"--kv-transfer-config": _json(connector), "--pooler-config": _json(pooler)}


SCRIPT = """#!/bin/sh
# Start vLLM for this folder, in an environment that has it: ./serve.sh [--port 8000] [any option of vllm serve].
# RAREC_LLM: the language model, if it is elsewhere.
set -eu
if [ -z "${RAREC_LLM:-}" ]; then RAREC_LLM=MODEL
elif [ -d "$RAREC_LLM" ]; then RAREC_LLM="$(cd "$RAREC_LLM" && pwd)"
fi
cd "$(dirname "$0")"
export PYTHONPATH="$PWD"
"""


def _json(fields: dict[str, Any]) -> str:
    return shlex.quote(json.dumps(fields))


def _refuse(parts: Parts, encoder: Encoder) -> None:
    """Refuse what vLLM would compute otherwise."""
    config, backbone = parts.bundle.config, encoder.model.backbone
    if not backbone.sink:
        raise UserError(f"{config.llm.path} is an encoder, which has no cache of keys and values", USE_ONNX)
    if config.llm.quantize != "none" or parts.llm_path.endswith(".gguf"):
        inside = "; or export the bundle with --with-llm, which holds the weights as they are used"
        remedy = f"{USE_ONNX}{inside * (config.llm.quantize == 'none')}"
        raise UserError(f"{config.llm.path} is quantised here in another way than by vLLM", remedy)
    if parts.bundle.variant.lora and config.lora.rank not in RANKS:
        ranks = ", ".join(map(str, RANKS))
        raise UserError(f"lora.rank {config.lora.rank}: vLLM takes {ranks}", f"train with one of these; or {USE_ONNX}")


def _compare(figures: dict[str, Any]) -> None:
    """Refuse a folder that says something else than the bundle."""
    for name in ("query_difference", "state_difference", "prefix_difference"):
        if figures.get(name, 0) > CLOSE:
            problem = f"{name} is {figures[name]:.1e}: the language model computes in a way that is not known here"
            raise UserError(problem, USE_ONNX)


@torch.no_grad()
def _states(encoder: Encoder, histories: Sequence[Rows], with_slots: bool) -> Float32:
    """Return the pooled states of users' texts (N, D); without slots, fillers stand in their places."""
    batch, tower, backbone = _batch(encoder, histories), encoder.model.user, encoder.model.backbone
    slots = None
    if with_slots and tower.slots and tower.alignment is not None:
        slots_LBKD, blocks = tower.alignment(batch.vectors)[0], tower.alignment_blocks
        slots = Slots(slots_LBKD[: len(blocks)], batch.positions_BK, blocks)
    hidden_BTD = backbone(batch.ids_BT, batch.mask_BT, slots)
    text_BT = backbone.read_mask(batch.mask_BT).scatter(1, batch.positions_BK, 0)
    return pool_text(hidden_BTD, text_BT, tower.readout.config.pool).numpy()


def _batch(encoder: Encoder, histories: Sequence[Rows]) -> SideBatch:
    """Return users' prompts with the vectors of their slots."""
    prompts, vectors = encoder.user_inputs(np.zeros(len(histories), np.int64), histories)
    return side_batch(prompts, vectors, encoder.model.user, encoder.prompts.tokenizer.filler)


def _inputs(
    graph: QueryGraph, encoder: Encoder, histories: Sequence[Rows], states: Float32
) -> tuple[torch.Tensor, ...]:
    """Return what a graph takes after some histories."""
    names = ("history", "input_ids", "slot_positions", "titles")
    given = dict(zip(names, query_inputs(graph, encoder, histories), strict=False))
    given["state"] = torch.from_numpy(states)
    return tuple(given[name] for name in graph.inputs)


def _few(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor[:4] for tensor in inputs)


def _write_prefix(parts: Parts, prefix: Prefix, histories: Sequence[Rows], directory: Path) -> float:
    """Write the connector and its program; return how far, in float32, its keys and values are from the model's."""
    model, dtype = parts.encoder.model, getattr(torch, parts.bundle.config.llm.dtype)
    write_program(model, prefix, directory / PROGRAM, torch.float32)
    shutil.copyfile(HERE / "connector.py", directory / "rarec_connector.py")
    shutil.copyfile(HERE / "program.py", directory / "rarec_program.py")
    program, batch = Program(directory / PROGRAM), _batch(parts.encoder, histories)
    vectors = {name: batch.vectors[name] for name in model.user.slots}
    flat = torch.cat([of.flatten(1) for of in vectors.values()], 1) if vectors else torch.zeros(len(histories), 0)
    expected = [of.transpose(0, 1) for of in cached(model, prefix, vectors)]
    found = [torch.stack(of) for of in zip(*map(program.prefix, flat), strict=True)]
    if dtype != torch.float32:
        write_program(model, prefix, directory / PROGRAM, dtype)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True))


def _write_graphs(
    parts: Parts, graph: QueryGraph, at_input: bool, histories: Sequence[Rows], states: Float32, directory: Path
) -> float:
    """Write what a client computes before and after its request; return how far its queries are from the bundle's."""
    inputs = _inputs(graph, parts.encoder, histories, states)
    write_graph(graph, _few(inputs), graph.inputs, "query", directory / QUERY)
    if parts.encoder.model.user.slots:
        slots = query_graph(parts, InputSlots if at_input else SlotVectors)
        given = _inputs(slots, parts.encoder, histories, states)
        write_graph(slots, _few(given), slots.inputs, "slots", directory / SLOTS)
    return apart_of(run_graph(directory / QUERY, graph, inputs), queries_of(parts, histories))


@torch.no_grad()
def _write_words(encoder: Encoder, histories: Sequence[Rows], states: Float32, directory: Path) -> float:
    """Write the table of word vectors; return how far states are from the model's when slots are put among these."""
    (directory / TEMPLATE).write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    backbone, batch = encoder.model.backbone, _batch(encoder, histories)
    with backbone.word_vectors() as words_VD:
        np.save(directory / WORDS, words_VD.float().numpy(), allow_pickle=False)
        embeddings_BTD = words_VD[batch.ids_BT]
    assert encoder.model.user.alignment is not None
    slots_BKD = encoder.model.user.alignment(batch.vectors)[0][0]
    at_BKD = batch.positions_BK[..., None].expand_as(slots_BKD)
    embeddings_BTD = embeddings_BTD.scatter(1, at_BKD, slots_BKD)
    output = backbone.trunk(inputs_embeds=embeddings_BTD, attention_mask=batch.mask_BT, use_cache=False)
    text_BT = backbone.read_mask(batch.mask_BT).scatter(1, batch.positions_BK, 0)
    found = pool_text(output.last_hidden_state, text_BT, encoder.model.user.readout.config.pool).numpy()
    return apart_of(found, states)
