"""Slots: positions whose hidden states are overwritten at the input of chosen blocks (docs/method.md, section 2).

Shape letters: B batch, T positions, L injected blocks, K slots, D hidden size.

The next overwrite discards what a block computes at a slot. So the text attends over Concat(d, h) with the block's own
norms, rotations and mask, exactly as in the paper's equation, and no attention code is patched.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Slots:
    """Hidden states for the slots of a batch.

    Attributes:
        slots_LBKD: the hidden states, for each injected block.
        positions_BK: positions of the slots in each sequence.
        blocks: the indices of the L injected blocks.
    """

    slots_LBKD: Tensor
    positions_BK: Tensor
    blocks: tuple[int, ...]


class SlotInjector:
    """Injects slots into a backbone's blocks within a context, by hooks that it removes afterwards.

    Before the first injected block a slot is an ordinary filler token; after the last one the blocks transform it like
    any other position.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self.current: Slots | None = None

    def inject(self, slots: Slots | None) -> AbstractContextManager[None]:
        """Overwrite the hidden states at the slots' positions within the context; None injects nothing."""
        return _Injection(self, slots)

    def reinject(self) -> AbstractContextManager[None]:
        """Return a context that injects the present slots later, when a checkpointed block is recomputed.

        It can be entered several times, since the backward pass may run more than once.
        """
        return _Injection(self, self.current)


class _Injection(AbstractContextManager[None]):
    def __init__(self, injector: SlotInjector, slots: Slots | None) -> None:
        self._injector, self._slots = injector, slots
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        hooks = []
        if self._slots is not None:
            chosen = [self._injector.blocks[block] for block in self._slots.blocks]
            per_block = zip(chosen, self._slots.slots_LBKD.unbind(0), strict=True)
            hooks = [(block, _overwrite(slots_BKD, self._slots.positions_BK)) for block, slots_BKD in per_block]
        self._hooks = [block.register_forward_pre_hook(hook, with_kwargs=True) for block, hook in hooks]
        self._before, self._injector.current = self._injector.current, self._slots

    def __exit__(self, *_: object) -> None:
        self._injector.current = self._before
        for hook in self._hooks:
            hook.remove()


def _overwrite(slots_BKD: Tensor, positions_BK: Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        index_BKD = positions_BK.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1])
        hidden_BTD = hidden_BTD.scatter(1, index_BKD, slots_BKD.to(hidden_BTD.dtype))
        return ((hidden_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTD})

    return hook
