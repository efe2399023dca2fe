"""Slots: positions whose hidden states are overwritten at the input of chosen blocks (docs/method.md, section 2).

Shape letters: B batch, T positions, L injected blocks, K slots, D hidden size.

The next overwrite discards what a block computes at a slot. So the text attends over Concat(d, h) with the block's own
norms, rotations and mask, exactly as in the paper's equation, and no attention code is patched.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


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


class _Present(NamedTuple):
    """The slots that are injected now, and by block what overwrites its input (B, K, D)."""

    slots: Slots
    by_block: Mapping[int, Tensor]


Variable = ContextVar[_Present | None]


class SlotInjector:
    """Injects slots into a backbone's blocks within a context.

    Every block gets one hook, which stays. The slots that it injects are a context variable: each thread has its own,
    so that several threads may use the model at once.

    Before the first injected block a slot is an ordinary filler token; after the last one the blocks transform it like
    any other position.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self._present: Variable = ContextVar("slots", default=None)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(_Overwrite(self._present, index), with_kwargs=True)

    @property
    def current(self) -> Slots | None:
        """The slots that this thread injects now."""
        present = self._present.get()
        return present.slots if present else None

    def inject(self, slots: Slots | None) -> AbstractContextManager[None]:
        """Overwrite the hidden states at the slots' positions within the context; None injects nothing."""
        if slots is not None and max(slots.blocks, default=0) >= len(self.blocks):
            raise IndexError(f"slots for the blocks {slots.blocks}, of {len(self.blocks)}")
        return _Injection(self._present, slots)

    def reinject(self) -> AbstractContextManager[None]:
        """Return a context that injects the present slots later, when a checkpointed block is recomputed.

        It can be entered several times, since the backward pass may run more than once, in any thread.
        """
        return _Injection(self._present, self.current)


class _Injection(AbstractContextManager[None]):
    def __init__(self, variable: Variable, slots: Slots | None) -> None:
        self._variable, self._slots = variable, slots
        self._token: Token[_Present | None] | None = None

    def __enter__(self) -> None:
        present = None
        if (slots := self._slots) is not None:
            present = _Present(slots, dict(zip(slots.blocks, slots.slots_LBKD.unbind(0), strict=True)))
        self._token = self._variable.set(present)

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            self._variable.reset(self._token)


@dataclass(frozen=True)
class _Overwrite:
    """A block's hook, which overwrites the block's input if it gets slots.

    Attributes:
        variable: the slots that are injected.
        index: of the block.
    """

    variable: Variable
    index: int

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        present = self.variable.get()
        if present is None or self.index not in present.by_block:
            return None
        hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        index_BKD = present.slots.positions_BK.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1])
        hidden_BTD = hidden_BTD.scatter(1, index_BKD, present.by_block[self.index].to(hidden_BTD.dtype))
        return ((hidden_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTD})

    def __deepcopy__(self, memo: object) -> "_Overwrite":
        """Return the same hook for a copy of the block: context variables cannot be copied."""
        return self
