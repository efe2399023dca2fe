"""The frozen language model: its blocks, its final hidden states, its pooled text-only states.

Shape letters: B batch, T positions, L blocks asked for, D hidden size, V vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from rarec.errors import UserError
from rarec.models.slots import SlotInjector, Slots

Pool = Literal["mean", "last"]
T = TypeVar("T")


class FrozenBackbone(nn.Module):
    """A Hugging Face encoder or decoder, frozen, in evaluation mode.

    Args:
        model: as loaded by `rarec.models.load`, PEFT-wrapped or not.
        pool: how text positions become one vector: their mean, or the last of them.
        sink: whether a prompt's first token is there for attention to rest on, as in decoders, and is not read.
        gradient_checkpointing: recompute blocks in the backward pass (non-reentrant).

    Raises:
        UserError: the model does not keep its blocks in a list, one a layer (ALBERT shares one among all).
    """

    def __init__(self, model: Any, pool: Pool, gradient_checkpointing: bool = False, sink: bool = False) -> None:
        super().__init__()
        self.model = model
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
        """The transformer without any head: no logits over the vocabulary are computed."""
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
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return cast(torch.dtype, self.model.dtype)

    @property
    def device(self) -> torch.device:
        """Where the frozen weights are."""
        return next(self.parameters()).device

    def forward(self, ids_BT: Tensor, mask_BT: Tensor, slots: Slots | None = None) -> Tensor:
        """Final hidden states (B, T, D), with slots overwritten where given."""
        with self.injector.inject(slots):
            return self._hidden(ids_BT, mask_BT)

    def text_states(self, ids_BT: Tensor, mask_BT: Tensor, blocks: Sequence[int]) -> Tensor:
        """Pooled hidden states entering each of `blocks` for a prompt without slots, as (L, B, D) (h~ of section 4)."""
        text_BT = self.read(mask_BT)
        return torch.stack(self.entering(ids_BT, mask_BT, blocks, lambda h_BTD: pool_text(h_BTD, text_BT, self.pool)))

    def read(self, mask_BT: Tensor) -> Tensor:
        """Where there is text to be read (B, T), out of where there is any: behind the sink.

        Its state can be a hundred times as long as the others, and says nothing of the text.
        """
        return mask_BT * (torch.arange(mask_BT.shape[1], device=mask_BT.device) >= self.sink)

    @torch.no_grad()
    def entering(
        self, ids_BT: Tensor, mask_BT: Tensor, blocks: Sequence[int], reduce: Callable[[Tensor], T]
    ) -> list[T]:
        """What `reduce` makes of the hidden states (B, T, D) entering each of `blocks` for a prompt without slots.

        LoRA is switched off: these states belong to the frozen base.
        """
        reduced: dict[int, T] = {}

        def keep(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reduced[index] = reduce(args[0] if args else kwargs["hidden_states"])

        chosen = [(index, self.blocks[index]) for index in blocks]
        hooks = [block.register_forward_pre_hook(partial(keep, i), with_kwargs=True) for i, block in chosen]
        try:
            with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else torch.no_grad():
                self._hidden(ids_BT, mask_BT)
        finally:
            for hook in hooks:
                hook.remove()
        return [reduced[block] for block in blocks]

    @contextmanager
    def word_vectors(self) -> Iterator[Tensor]:
        """In it the table of input embeddings (V, D) is whole, also where an engine has sharded it. All ranks ask.

        In some encoders it is narrower than hidden states.
        """
        weight = self.model.get_input_embeddings().weight
        with whole(weight), torch.no_grad():
            yield weight.full_tensor() if hasattr(weight, "full_tensor") else weight.detach()

    def fingerprint(self) -> str:
        """sha256 over configuration, names, shapes and 64 values of every frozen tensor but those of a pooler.

        Other weights, another print. A pooler is not used, and where a checkpoint lacks it, transformers makes it up
        anew each time.
        """
        digest = hashlib.sha256(config_hash(self.model.config).encode())
        for name, parameter in self.trunk.named_parameters():
            if "lora_" not in name and not name.startswith("pooler."):
                with whole(parameter):
                    flat = parameter.detach().flatten()
                    probe = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long()
                    digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}".encode())
                    digest.update(flat[probe.to(flat.device)].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _hidden(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        with self._blocks_training(self.recomputes and self.training and torch.is_grad_enabled()):
            output = self.trunk(input_ids=ids_BT, attention_mask=mask_BT, **self._no_cache)
        return cast(Tensor, output.last_hidden_state)

    @property
    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}

    def _checkpoint_blocks(self) -> None:
        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return self._blocks_training(False), self.injector.again()

        renamed = getattr(self.model, "activation_checkpointing_enable", None)  # newer releases deprecate the old name
        enable = renamed or self.model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": contexts})
        self.model.disable_input_require_grads()  # only reentrant checkpoints need it; here it costs idle gradients

    @contextmanager
    def _blocks_training(self, mode: bool) -> Iterator[None]:
        """Only blocks in training mode are recomputed. They are, but not inside the checkpoint: nothing drops out."""
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
        """Frozen layers stay in evaluation mode and never drop out; only LoRA's own dropout follows the mode."""
        super().train(False)
        self.training = mode
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.training = mode
        return self


def pool_text(hidden_BTD: Tensor, text_BT: Tensor, pool: Pool) -> Tensor:
    """One vector (B, D), float32, from the hidden states at text positions: their mean, or the last of them (ours)."""
    if pool == "mean":
        weights_BT = text_BT.float()
        return torch.einsum("btd,bt->bd", hidden_BTD.float(), weights_BT) / weights_BT.sum(1, keepdim=True)
    order_T = torch.arange(1, text_BT.shape[1] + 1, device=text_BT.device)
    last_B = (text_BT * order_T).argmax(1)
    return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B].float()


def whole(parameter: nn.Parameter) -> AbstractContextManager[None]:
    """In it a parameter that ZeRO-3 has sharded is whole, to be read. All ranks must ask."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    gathered: AbstractContextManager[None] = GatheredParameters([parameter])
    return gathered


def config_hash(config: Any) -> str:
    """sha256 of a model configuration, without the fields that tell where and by what version it was saved."""
    fields = config.to_dict()
    for volatile in (
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "_attn_implementation",
        "use_cache",
    ):
        fields.pop(volatile, None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
