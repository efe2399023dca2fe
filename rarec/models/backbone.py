"""The frozen language model: its blocks, its final hidden states, its pooled text-only states.

Shape letters: B batch, T positions, L requested blocks, D hidden size, V vocabulary, K slots, S positions of packed
prompts.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from rarec.errors import UserError
from rarec.models.slots import SlotInjector, Slots

Pool = Literal["mean", "last"]
T = TypeVar("T")
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache"}
"""Fields of a model's configuration that depend on where and how it was saved."""


class FrozenBackbone(nn.Module):
    """A Hugging Face encoder or decoder, frozen, in evaluation mode.

    Args:
        model: the transformers model, with or without PEFT's wrapper.
        pool: how text positions are pooled to one vector: their mean, or the last of them.
        sink: whether a prompt's first token is an attention sink, as in decoders; it is not read.
        gradient_checkpointing: recompute blocks in the backward pass (non-reentrant checkpoints).
        packs: run prompts end to end instead of padded (see `Packing`).

    Raises:
        UserError: the model has no list of blocks, one for each layer (ALBERT shares one block among all layers).
    """

    def __init__(
        self, model: Any, pool: Pool, gradient_checkpointing: bool = False, sink: bool = False, packs: bool = False
    ) -> None:
        super().__init__()
        self.model, self.packs = model, packs
        self.pool: Pool = pool
        self.sink = sink
        self.hidden_size = int(model.config.hidden_size)
        self.injector = SlotInjector(self.blocks)
        self.recomputes = gradient_checkpointing
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        if gradient_checkpointing:
            self._checkpoint_blocks()

    @property
    def trunk(self) -> nn.Module:
        """The transformer without its head, so that no logits over the vocabulary are computed."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return cast(nn.Module, getattr(base, base.base_model_prefix, base))

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        count = self.model.config.num_hidden_layers
        lists = [part for part in self.trunk.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
        if not lists:
            name = type(self.trunk).__name__
            raise UserError(f"llm.path: {name} has no list of {count} blocks", "choose another architecture")
        return lists[0]

    @property
    def device(self) -> torch.device:
        """The device of the frozen weights."""
        return next(self.parameters()).device

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, slots: Slots | None = None) -> Tensor:
        """Return the final hidden states (B, T, D); `slots`, if given, overwrite hidden states on the way."""
        packing = Packing.of(mask_BT) if self.packs else None
        with self.injector.inject(packing.moved(slots) if packing is not None and slots is not None else slots):
            return self._run(ids_BT, mask_BT, packing)

    def text_states(self, ids_BT: Tensor, mask_BT: Tensor, blocks: Sequence[int]) -> Tensor:
        """Return the pooled hidden states (L, B, D) that enter each of `blocks`, of prompts without slots.

        They are the h~ of docs/method.md, section 4.
        """
        text_BT = self.read_mask(mask_BT)
        return torch.stack(
            self.block_inputs(ids_BT, mask_BT, blocks, lambda h_BTD: pool_text(h_BTD, text_BT, self.pool))
        )

    def read_mask(self, mask_BT: Tensor) -> Tensor:
        """Return the mask (B, T) of positions that are read out: all of `mask_BT` but the attention sink.

        The state of a sink can be a hundred times as long as others, and holds nothing of the text.
        """
        return mask_BT * (torch.arange(mask_BT.shape[1], device=mask_BT.device) >= self.sink)

    @torch.no_grad()
    def final_text_states(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the pooled final hidden states (B, D) of prompts without slots."""
        return pool_text(self(ids_BT, mask_BT), self.read_mask(mask_BT), self.pool)

    @torch.no_grad()
    def block_inputs(
        self, ids_BT: Tensor, mask_BT: Tensor, blocks: Sequence[int], reduce: Callable[[Tensor], T]
    ) -> list[T]:
        """Apply `reduce` to the hidden states (B, T, D) that enter each of `blocks`, of prompts without slots.

        LoRA is switched off: these are states of the frozen base model.
        """
        reduced: dict[int, T] = {}
        packing = Packing.of(mask_BT) if self.packs else None

        def keep(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            reduced[index] = reduce(packing.unpacked(hidden) if packing is not None else hidden)

        chosen = [(index, self.blocks[index]) for index in blocks]
        hooks = [block.register_forward_pre_hook(partial(keep, i), with_kwargs=True) for i, block in chosen]
        try:
            with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else torch.no_grad():
                self._run(ids_BT, mask_BT, packing)
        finally:
            for hook in hooks:
                hook.remove()
        return [reduced[block] for block in blocks]

    @contextmanager
    def word_vectors(self) -> Iterator[Tensor]:
        """Yield the whole table of input embeddings (V, D), also if an engine has sharded it; all ranks call together.

        In some encoders it is narrower than hidden states.
        """
        weight = self.model.get_input_embeddings().weight
        with gathered(weight), torch.no_grad():
            yield weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()

    def _run(self, ids_BT: Tensor, mask_BT: Tensor, packing: "Packing | None") -> Tensor:
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if packing is not None:
            inputs = {"input_ids": packing.packed(ids_BT), "position_ids": packing.position_ids_1S}
        cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        with self._blocks_training(self.recomputes and self.training and torch.is_grad_enabled()):
            hidden: Tensor = self.trunk(**inputs, **cache).last_hidden_state
        return hidden if packing is None else packing.unpacked(hidden)

    def _checkpoint_blocks(self) -> None:
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return self._blocks_training(False), self.injector.reinject()

        renamed = getattr(self.model, "activation_checkpointing_enable", None)  # newer releases deprecate the old name
        enable = renamed or self.model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": contexts})
        self.model.disable_input_require_grads()  # only reentrant checkpoints need it; here it costs idle gradients

    @contextmanager
    def _blocks_training(self, mode: bool) -> Iterator[None]:
        """Set the blocks' training flag: transformers recomputes only blocks in training mode.

        Inside the checkpoint the flag is off again, so that no dropout is applied.
        """
        blocks = self.injector.blocks
        before = [block.training for block in blocks]
        for block in blocks:
            block.training = mode
        try:
            yield
        finally:
            for block, training in zip(blocks, before, strict=True):
                block.training = training

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Set the mode of LoRA's dropout; frozen layers stay in evaluation mode and apply no dropout."""
        super().train(False)
        self.training = mode
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.training = mode
        return self


@dataclass(frozen=True)
class Packing:
    """Where the positions of a padded batch are if its prompts run end to end, in one row without padding.

    Attention that skips other prompts' positions then wastes nothing. Decoders of transformers keep the prompts apart
    by their position ids, which start at 0 in each. The row has one position more, a prompt of its own: what is on
    padding, such as the slots of titles that a history lacks, is moved there.

    Attributes:
        places_BT: the place of each position; S - 1 for padding.
        position_ids_1S: each token's position in its own prompt.
        real_BT: marks what is no padding.
    """

    places_BT: Tensor
    position_ids_1S: Tensor
    real_BT: Tensor

    @classmethod
    def of(cls, mask_BT: Tensor) -> "Packing":
        """Pack prompts, which are padded on the right."""
        real_BT = mask_BT.bool()
        places_BT = torch.where(real_BT, real_BT.flatten().cumsum(0).view_as(mask_BT) - 1, real_BT.sum())
        own_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(mask_BT)
        last = own_BT.new_zeros(1)
        return cls(places_BT, torch.cat([own_BT[real_BT], last])[None], real_BT)

    def packed(self, ids_BT: Tensor) -> Tensor:
        """Return the tokens, (1, S)."""
        return torch.cat([ids_BT[self.real_BT], ids_BT[0, :1]])[None]

    def moved(self, slots: Slots) -> Slots:
        """Return the slots where they are in the row."""
        places_1K = self.places_BT.gather(1, slots.positions_BK).flatten()[None]
        return Slots(slots.slots_LBKD.flatten(1, 2)[:, None], places_1K, slots.blocks)

    def unpacked(self, hidden_1SD: Tensor) -> Tensor:
        """Return the hidden states as they would be padded, (B, T, D); on padding they mean nothing."""
        return hidden_1SD[0][self.places_BT]


def pool_text(hidden_BTD: Tensor, text_BT: Tensor, pool: Pool) -> Tensor:
    """Pool the hidden states at text positions to one vector (B, D), float32: their mean, or the last one [D]."""
    if pool == "mean":
        weights_BT = text_BT.float()
        return torch.einsum("btd,bt->bd", hidden_BTD.float(), weights_BT) / weights_BT.sum(1, keepdim=True)
    order_T = torch.arange(1, text_BT.shape[1] + 1, device=text_BT.device)
    last_B = (text_BT * order_T).argmax(1)
    return hidden_BTD[torch.arange(last_B.shape[0], device=last_B.device), last_B].float()


def gathered(parameter: nn.Parameter) -> AbstractContextManager[None]:
    """Gather a parameter that ZeRO-3 has sharded, for reading within the context; all ranks call together."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[None] = GatheredParameters([parameter])
    return context


def fingerprint(trunk: nn.Module, config: Any) -> str:
    """Return a sha256 over the configuration and the name, shape and 64 values of every frozen tensor.

    A pooler does not count: it is not used, and transformers fills it with random numbers if a checkpoint lacks it.
    """
    digest = hashlib.sha256(config_hash(config).encode())
    for name, parameter in trunk.named_parameters():
        if "lora_" not in name and not name.startswith("pooler."):
            with gathered(parameter):
                flat = parameter.detach().flatten()
                chosen = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long()
                digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}".encode())
                digest.update(flat[chosen.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def config_hash(config: Any) -> str:
    """Return the sha256 of a model configuration, without fields that depend on where and how it was saved."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
