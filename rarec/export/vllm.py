"""`--to vllm`: a folder that stock vLLM is started by, and a client that sends it histories.

Slots of every block go as a prefix of keys and values (`prefix`), slots at the input alone as embeddings of a prompt.

Shape letters: B users, S positions of a history, L blocks, P positions of the prefix, K slots, E source dimension,
V vocabulary, D hidden size, F size of the fused vectors.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rarec.bundle.parts import Parts, sample_histories
from rarec.config.shipped import resolve_path
from rarec.errors import UserError
from rarec.export import Target, raise_if_far
from rarec.export.formats import Peft, add_facts
from rarec.export.graphs import QueryGraph, difference, padded, write_graph
from rarec.export.onnx import CHECKED, CLOSE, QUERY, Onnx, copy_beside, copy_client, write_prompts
from rarec.export.prefix import USE_ONNX, Prefix, cached, write_program
from rarec.export.rarec_program import Program
from rarec.models.backbone import pool_text
from rarec.models.build import LORA
from rarec.models.encode import Encoder
from rarec.models.towers import SideBatch, side_batch

Float32 = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
SLOTS, PROGRAM, WORDS, TEMPLATE = "slots.onnx", "program.safetensors", "words.npy", "words.jinja"
CHECK, START = "check.npz", "serve.sh"
CHECKED_BY_CLIENT = 8
"""Histories by which a client checks its server."""
RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks of LoRA weights that vLLM takes."""


class StateQuery(QueryGraph):
    """The searched vectors (B, K, F), from `history`, `state` (B, D), the pooled state of the text, and `titles`."""

    prompt_inputs = ("state",)

    def encode(self, slots: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        """Read out the state, and the slots as they are behind the last block."""
        tower = self.model.user
        state_BD = given["state"]
        last_BKD = state_BD[:, None][:, :0]
        roles = dict[str, Tensor]()
        if tower.alignment is not None:
            last_BKD = tower.alignment(slots)[0][-1]
            roles = tower.alignment.role_masks(slots)
        vectors_BZ: Tensor = tower.readout(state_BD[:, None], torch.ones_like(state_BD[:, :1]), last_BKD, roles)
        return vectors_BZ * self.model.log_scale.exp()


class SlotVectors(QueryGraph):
    """The ID vectors of a user's slots, of all sources one behind the other, (B, K * E), from `history`."""

    prompt_inputs = ()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the vectors."""
        given, vectors = self.read(*inputs)
        slots = self.slots(vectors, given)
        return torch.cat([slots[name].flatten(1) for name in self.model.user.slots], 1)


class InputSlots(SlotVectors):
    """The slots themselves where they enter the first block, (B, K, D)."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the slots."""
        given, vectors = self.read(*inputs)
        assert self.model.user.alignment is not None
        slots_LBKD: Tensor = self.model.user.alignment(self.slots(vectors, given))[0]
        return slots_LBKD[0]


@dataclass(frozen=True)
class Vllm(Target):
    """The start script, the slots' program or embeddings, the client, and figures of their differences.

    Raises:
        UserError: vLLM cannot serve this bundle without losing what it says.
    """

    needs = ("vectors", "faiss")
    packages = Onnx.packages
    alone = True

    def write(self, parts: Parts, directory: Path) -> dict[str, Any]:
        """See `Target`."""
        encoder = parts.encoder
        _refuse(parts, encoder)
        pool = parts.bundle.config.readout.pool
        graph = StateQuery(parts)
        histories = sample_histories(parts, CHECKED)
        batch = side_batch(
            *encoder.user_inputs(np.zeros(CHECKED, np.int64), histories),
            encoder.model.user,
            encoder.prompts.tokenizer.filler,
        )
        states, bare = (_states(encoder, batch, slots) for slots in (True, False))
        lora = parts.bundle.variant.lora
        at_input = parts.bundle.variant.blocks == "input" and bool(encoder.model.user.slots)
        prompt = write_prompts(graph, directory)
        figures = {"query_difference": _write_graphs(parts, graph, at_input, histories, states, directory)}
        if at_input:
            figures["state_difference"] = _write_words(encoder, batch, states, directory)
        else:
            figures["prefix_difference"] = _write_prefix(parts, Prefix.of(prompt, pool), batch, directory)
        for name, value in figures.items():
            raise_if_far(name, value, CLOSE, USE_ONNX)
        figures |= Peft().write(parts, directory / LORA) if lora else {}
        few = slice(CHECKED_BY_CLIENT)
        np.savez(directory / CHECK, histories=padded(histories[few]).numpy(), states=states[few], bare=bare[few])
        add_facts(directory, prompt=prompt, vllm={"name": "rarec-lora" if lora else "rarec", "pool": pool})
        _write_start(parts, at_input, lora, directory / START)
        copy_client(directory)
        copy_beside(directory, "rarec_vllm.py")
        return figures


def _refuse(parts: Parts, encoder: Encoder) -> None:
    """Refuse what vLLM would compute in another way."""
    config = parts.bundle.config
    if not encoder.model.backbone.sink:
        raise UserError(f"{config.llm.path} is an encoder, which has no cache of keys and values", USE_ONNX)
    if config.llm.quantize != "none" or parts.model.llm_path.endswith(".gguf"):
        inside = "; or export the bundle with --with-llm, which holds the weights as they are used"
        remedy = f"{USE_ONNX}{inside * (config.llm.quantize == 'none')}"
        raise UserError(f"{config.llm.path} is quantised here in another way than by vLLM", remedy)
    if parts.bundle.variant.lora and config.lora.rank not in RANKS:
        ranks = ", ".join(map(str, RANKS))
        raise UserError(f"lora.rank {config.lora.rank}: vLLM takes {ranks}", f"train with one of these; or {USE_ONNX}")


def _write_start(parts: Parts, at_input: bool, lora: bool, path: Path) -> None:
    """Write the script that starts vLLM; whoever may read it may run it."""
    config = parts.bundle.config
    model = resolve_path(parts.model.llm_path)
    elsewhere = not Path(model).exists()
    model = model if elsewhere else str(Path(model).resolve())  # the script runs in its own folder
    longest = config.prompt.max_tokens or parts.model.context_length
    options = [
        *([f"--revision {shlex.quote(config.llm.revision)}"] if config.llm.revision and elsewhere else []),
        f"--dtype {config.llm.dtype}",
        f"--max-model-len {longest}",
        f"--max-num-batched-tokens {max(longest, 8192)}",  # no text comes in parts
        *(_of_embeddings() if at_input else _of_prefix(config.readout.pool)),
        *(["--enable-lora", "--lora-modules rarec-lora=lora", f"--max-lora-rank {config.lora.rank}"] if lora else []),
    ]
    script = Path(__file__).with_name(START).read_text().replace("OPTIONS", " \\\n  ".join(options), 1)
    path.write_text(script.replace("MODEL", shlex.quote(model), 1))
    mode = path.stat().st_mode
    path.chmod(mode | (mode & 0o444) >> 2)


def _of_embeddings() -> list[str]:
    """Return options of a server that takes embeddings; the client pools."""
    pooler = _json(task="token_embed", use_activation=False)
    return ["--enable-prompt-embeds", f"--chat-template {TEMPLATE}", f"--pooler-config {pooler}"]


def _of_prefix(pool: str) -> list[str]:
    """Return options of a server with the connector."""
    connector = _json(kv_connector="SlotConnector", kv_connector_module_path="rarec_connector", kv_role="kv_both")
    pooler = _json(pooling_type=pool.upper(), use_activation=False)
    return [f"--kv-transfer-config {connector}", f"--pooler-config {pooler}"]


def _json(**fields: Any) -> str:
    return shlex.quote(json.dumps(fields))


@torch.no_grad()
def _states(encoder: Encoder, batch: SideBatch, with_slots: bool) -> Float32:
    """Return the pooled states of users' texts (B, D); without slots, fillers are in their places."""
    tower = encoder.model.user
    slots_LBKD = tower.alignment(batch.vectors)[0] if with_slots and tower.alignment is not None else None
    hidden_BTD, *_ = tower.final_states(encoder.model.backbone, batch, slots_LBKD)
    return _pooled(encoder, hidden_BTD, batch)


def _pooled(encoder: Encoder, hidden_BTD: Tensor, batch: SideBatch) -> Float32:
    """Return the pooled states of texts (B, D), without the slots'."""
    text_BT = encoder.model.backbone.read_mask(batch.mask_BT).scatter(1, batch.positions_BK, 0)
    return pool_text(hidden_BTD, text_BT, encoder.model.user.readout.config.pool).numpy()


def _write_graphs(
    parts: Parts, graph: StateQuery, at_input: bool, histories: Sequence[Rows], states: Float32, directory: Path
) -> float:
    """Write what a client computes before and after its request; return how far its queries are from the bundle's."""
    inputs = graph.inputs_of(histories, state=torch.from_numpy(states))
    queries = write_graph(graph, inputs, "query", directory / QUERY)
    if parts.encoder.model.user.slots:
        slots = (InputSlots if at_input else SlotVectors)(parts)
        write_graph(slots, slots.inputs_of(histories), "slots", directory / SLOTS)
    return difference(queries, parts.dense.users(histories))


def _write_prefix(parts: Parts, prefix: Prefix, batch: SideBatch, directory: Path) -> float:
    """Write the connector and its program; return how far, in float32, its keys and values are from the model's."""
    model = parts.encoder.model
    dtype = getattr(torch, parts.bundle.config.llm.dtype)
    write_program(model, prefix, directory / PROGRAM, torch.float32)
    copy_beside(directory, "rarec_connector.py", "rarec_program.py")
    program = Program(directory / PROGRAM)
    vectors = {name: batch.vectors[name] for name in model.user.slots}
    none = torch.zeros(len(batch.ids_BT), 0)
    prefixes = map(program.prefix, torch.cat([none, *(table.flatten(1) for table in vectors.values())], 1))
    own = [torch.stack(tables, 1) for tables in zip(*prefixes, strict=True)]
    if dtype != torch.float32:
        write_program(model, prefix, directory / PROGRAM, dtype)
    pairs = zip(own, cached(model, prefix, vectors), strict=True)
    return max(float((table - other).abs().max() / other.abs().max()) for table, other in pairs)


@torch.no_grad()
def _write_words(encoder: Encoder, batch: SideBatch, states: Float32, directory: Path) -> float:
    """Write the table of word vectors; return how far states are from the model's when slots are put among these."""
    (directory / TEMPLATE).write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    backbone = encoder.model.backbone
    with backbone.word_vectors() as words_VD:
        np.save(directory / WORDS, words_VD.float().numpy(), allow_pickle=False)
        embeddings_BTD = words_VD[batch.ids_BT]
    assert encoder.model.user.alignment is not None
    slots_BKD = encoder.model.user.alignment(batch.vectors)[0][0]
    index_BKD = batch.positions_BK[..., None].expand_as(slots_BKD)
    embeddings_BTD = embeddings_BTD.scatter(1, index_BKD, slots_BKD)
    output = backbone.trunk(inputs_embeds=embeddings_BTD, attention_mask=batch.mask_BT, use_cache=False)
    return difference(_pooled(encoder, output.last_hidden_state, batch), states)
