"""A KV connector for stock vLLM: a user's slots as a prefix whose keys and values are computed already.

`rarec export --to vllm` copies this file beside `rarec_program.py` and its program; they need torch, safetensors and
vLLM, not rarec. A request brings the user's ID vectors in its id, as `slots.VECTORS.`, where VECTORS is base64
(URL-safe) of little-endian float32; offline, where ids are vLLM's, in its `cache_salt`.

Missing slots raise no error by themselves. So the state of a request without vectors, or that was computed
without the prefix, is NaN: vLLM has no way to fail one request to a pooling model. vLLM's own prefix cache, which knows
users by their text alone, must be off.

Shape letters: B requests, T positions of a text, D hidden size.
"""

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rarec_program import Program
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")
VECTORS = re.compile(r"slots\.([\w=-]*)\.", re.ASCII)


@dataclass
class Loads(KVConnectorMetadata):
    """What the worker loads before a step.

    Attributes:
        vectors: of each request.
        blocks: ids of each request's first blocks.
    """

    vectors: list[list[float]] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)


class SlotConnector(KVConnectorBase_V1, SupportsHMA):
    """Writes the prefix of every request into vLLM's cache; see the head of this file."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.program = Program(Path(__file__).with_name("program.safetensors"))
        self.block_size = vllm_config.cache_config.block_size
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("start vLLM with --no-enable-prefix-caching: users of one text would share their slots")
        if vllm_config.parallel_config.world_size > 1:
            raise ValueError("start vLLM on one device: a part of a model has a part of the heads or blocks alone")
        _pool_the_text(self.program.length)
        self.wanted: dict[str, tuple[list[float], list[int]]] = {}

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens of a request are not computed by the model: those of its prefix."""
        if self._vectors(request) is None or request.num_tokens <= self.program.length:
            logger.error(
                "%s gets NaN: it lacks text or %d numbers in its id", request.request_id[-8:], self.program.size
            )
            return 0, False
        return self.program.length - num_computed_tokens, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note whose prefix is to be loaded, and where."""
        vectors = self._vectors(request)
        if num_external_tokens > 0 and vectors is not None:
            self.wanted[request.request_id] = (vectors, list(blocks.get_block_ids()[0]))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """Return what the worker loads in this step."""
        wanted = list(self.wanted.values())
        self.wanted = {}
        return Loads([vectors for vectors, _ in wanted], [blocks for _, blocks in wanted])

    def _vectors(self, request: Any) -> list[float] | None:
        """Return the numbers that a request brings, None where they are not those of its slots."""
        match = VECTORS.search(f"{request.request_id} {request.cache_salt}")
        try:
            vectors = np.frombuffer(base64.urlsafe_b64decode(match[1]), "<f4") if match else np.empty(0)
        except ValueError:
            return None
        right = match and len(vectors) == self.program.size and bool(np.isfinite(vectors).all())
        return vectors.tolist() if right else None

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        """Keep nothing of a request."""
        return False, None

    # In the worker.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the prefixes of this step's new requests into the cache of every block."""
        loads = self._get_connector_metadata()
        layers = _layers(forward_context)
        if not loads.vectors:
            return
        device = layers[0].kv_cache.device
        program = self.program.to(device)
        made = [program.prefix(torch.tensor(vectors, device=device)) for vectors in loads.vectors]
        keys, values = (torch.cat(tables, 1) for tables in zip(*made, strict=True))
        places = torch.cat([self._places(blocks) for blocks in loads.blocks]).to(device)
        for index, layer in enumerate(layers):
            key, value = (table[index].contiguous().to(layer.kv_cache.dtype) for table in (keys, values))
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, places)

    def _places(self, blocks: Sequence[int]) -> Tensor:
        size = int(self.block_size)
        positions = torch.arange(int(self.program.length))
        return torch.tensor(blocks)[positions // size] * size + positions % size

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded in the background."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def _layers(forward_context: Any) -> list[Any]:
    """Return the attention layers, in the order in which the model made them."""
    made = forward_context.no_compile_layers.values()
    return [layer for layer in made if getattr(layer, "kv_cache", None) is not None and hasattr(layer, "impl")]


def _pool_the_text(prefix: int) -> None:
    """Have vLLM pool the text, which is behind the prefix; its own mean refuses a prefix.

    A state that was computed without the prefix becomes NaN.
    """
    from vllm.model_executor.layers.pooler.seqwise import methods

    def pooled(pool: Callable[[Tensor], Tensor], hidden_states: Tensor, pooling_metadata: Any) -> Tensor:
        cursor = pooling_metadata.get_pooling_cursor()
        texts = hidden_states.split(cursor.num_scheduled_tokens_cpu.tolist())
        right = cursor.prompt_lens_cpu - cursor.num_scheduled_tokens_cpu == prefix
        states_BD: Tensor = torch.stack([pool(text_TD.float()) for text_TD in texts])
        return states_BD.masked_fill(~right[:, None].to(states_BD.device), torch.nan)

    methods.MeanPool.forward = lambda self, *given: pooled(lambda text_TD: text_TD.mean(0), *given)
    methods.LastPool.forward = lambda self, *given: pooled(lambda text_TD: text_TD[-1], *given)
