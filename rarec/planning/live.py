"""Bytes that live at once, counted operation by operation: on the meta device it is all that a run would allocate."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """While it is entered, what operations allocate is counted until it is freed.

    Args:
        held: tensors that were there before, and are not counted.

    Attributes:
        now: bytes.
        peak: the most there were at once.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = [tensor.untyped_storage() for tensor in held]  # kept, lest another storage take the place of one
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._held}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and count the storages that it returns. Where a value is asked for, the answer is no."""
        if func is torch.ops.aten._local_scalar_dense.default:  # such as whether nothing is padded
            return False
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size
