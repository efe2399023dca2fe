"""The processes that share a run's work, and the collective operations they use.

Without a launcher a process is rank 0 of 1, and nothing here touches `torch.distributed`.

Shape letters: b rows of this rank, B rows of all ranks. Row i of rank r is row i * size + r of the whole, so the order
of rows is the same on any number of ranks, and shares differ by at most one row.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from rarec.console.progress import track
from rarec.errors import UserError

T = TypeVar("T")
CPU = torch.device("cpu")


class Place:
    """What a rank is doing, as its watchdog thread reads it.

    Attributes:
        now: ((restarts, step, calls in the step), what it is doing, since when). The rank with the smallest first
            element is the one that is behind.
    """

    def __init__(self) -> None:
        self.now = ((0, 0, 0), "starting", time.monotonic())

    def report(self, doing: str, step: int | None) -> None:
        """See `World.report`."""
        (turn, last, calls), _, _ = self.now
        step = last if step is None else step
        place = (turn + (step < last), step, calls + 1 if step == last else 0)
        self.now = place, doing, time.monotonic()  # replaced as a whole: another thread reads it


@dataclass(frozen=True)
class World:
    """This process among all ranks.

    Attributes:
        rank: index of this process, from 0.
        size: number of processes.
        device: where tensors are placed for communication.
        place: what this rank is doing.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    place: Place = field(default_factory=Place, compare=False)

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes files and prints for all."""
        return self.rank == 0

    def report(self, doing: str, step: int | None = None) -> None:
        """Tell the watchdog what this rank is doing, in which step (default: the same one).

        Every rank must report equally often in each step: the one that has reported least is behind.
        """
        self.place.report(doing, step)

    def local_rows(self, total: int) -> Tensor:
        """Return the indices (b) of this rank's rows among B = `total`."""
        return torch.arange(self.rank, total, self.size, device=self.device)

    def split_in_lockstep(self, jobs: Sequence[T]) -> Iterator[tuple[bool, T]]:
        """Split jobs that every rank knows; yield (whether the job is this rank's, job).

        Every rank yields equally often, because a sharded model must be called equally often on all ranks: a rank with
        one job fewer repeats another rank's, marked False.
        """
        rounds = -(-len(jobs) // self.size)
        yield from self._in_rounds(rounds, jobs[self.rank :: self.size], jobs[-1:])

    def in_lockstep(self, jobs: Sequence[T]) -> Iterator[tuple[bool, T]]:
        """Yield this rank's own jobs, marked True, then repeat the last one, marked False, until all ranks are done."""
        yield from self._in_rounds(self.all_reduce_max(len(jobs)), jobs, jobs[-1:])

    def _in_rounds(self, rounds: int, own: Sequence[T], spare: Sequence[T]) -> Iterator[tuple[bool, T]]:
        doing = self.place.now[1]
        for number in track(range(rounds), doing) if rounds > 1 else range(rounds):  # one is soon over
            self.report(doing)
            yield (True, own[number]) if number < len(own) else (False, spare[0])

    def gather_rows(self, rows_b: Tensor, total: int) -> Tensor:
        """Return the rows of all ranks in global order, (B, ...); gradients flow back to the rank that owns a row.

        Args:
            rows_b: this rank's rows, (b, ...).
            total: B.
        """
        gathered: Tensor = rows_b if self.size == 1 else _GatherRows.apply(rows_b, self, total)  # type: ignore[no-untyped-call]
        return gathered

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return every rank's tensor, all of one shape; no gradient passes."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def broadcast(self, tensor: Tensor | None, source: int, shape: tuple[int, ...]) -> Tensor:
        """Return one rank's tensor on all ranks.

        Args:
            tensor: float32, on the rank that has it.
            source: that rank.
            shape: of the tensor.
        """
        sent = torch.empty(shape, device=self.device) if tensor is None else tensor.contiguous()
        if self.size > 1:
            dist.broadcast(sent, source)
        return sent

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks; no gradient passes."""
        whole = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(whole)
        return whole

    def all_reduce_sum_(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Replace an array, in place, by its sum over all ranks.

        The sum is exact where one rank has computed a value and the others hold a zero.
        """
        return self._all_reduce_(array, dist.ReduceOp.SUM)

    def all_reduce_max_(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Replace an array, in place, by its elementwise maximum over all ranks."""
        return self._all_reduce_(array, dist.ReduceOp.MAX)

    def all_reduce_max(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        return int(self.all_reduce_max_(np.array([number]))[0])

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Run work that needs no other rank on every rank; if it fails on one, fail on all.

        Raises:
            Exception: on the first rank that failed, the original exception.
            UserError: on the other ranks: which rank failed, and its message.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            if self.size == 1:
                raise
            error = caught
        messages = self.exchange("" if error is None else str(error) or type(error).__name__)
        failed = next((rank for rank, text in enumerate(messages) if text), None)
        if failed is None:
            return result  # type: ignore[return-value]
        if error is not None and failed == self.rank:
            raise error
        raise UserError(f"rank {failed}: {messages[failed]}", shared=True)

    def run_on_main(self, work: Callable[[], object]) -> None:
        """Run work, such as writing files, on rank 0; the other ranks wait, and fail if it fails."""
        self.run_on_all(lambda: work() if self.is_main else None)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.run_on_all(lambda: None)

    def _all_reduce_(self, array: npt.NDArray[Any], by: dist.ReduceOp.RedOpType) -> npt.NDArray[Any]:
        for piece in np.array_split(array, 1 + (array.nbytes >> 28)) if self.size > 1 else ():
            reduced = torch.from_numpy(piece).to(self.device)
            dist.all_reduce(reduced, by)
            piece[...] = reduced.cpu().numpy()
        return array

    def exchange(self, text: str) -> list[str]:
        """Return every rank's text, in the order of ranks."""
        if self.size == 1:
            return [text]
        # as numbers: `all_gather_object` would pickle, and nothing here reads a pickle
        own = torch.frombuffer(bytearray(text.encode(errors="backslashreplace") or b"\0"), dtype=torch.uint8)
        padded = torch.zeros(self.all_reduce_max(len(own)), dtype=torch.uint8, device=self.device)
        padded[: len(own)] = own.to(self.device)
        return [bytes(each.cpu().tolist()).rstrip(b"\0").decode() for each in self.all_gather(padded)]


SINGLE = World()
"""A process without others."""


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_b: Tensor, world: World, total: int) -> Tensor:
        ctx.world = world
        most = -(-total // world.size)  # shares differ by at most one row: pad the shorter ones
        padded_b = torch.cat([rows_b, rows_b.new_zeros(most - len(rows_b), *rows_b.shape[1:])])
        return torch.stack(world.all_gather(padded_b.contiguous()), 1).flatten(0, 1)[:total]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        world: World = ctx.world
        return world.all_reduce_sum(gradients[0])[world.rank :: world.size], None, None
