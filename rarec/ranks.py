"""The ranks that share a run's work: which one this process is, and how all come to have what each has made.

Without a launcher a process is rank 0 of 1, and nothing here touches torch.distributed.

Shape letters: b rows of this rank, B rows of all ranks. Row i of rank r is row i * count + r of all, so that the order
of rows is the same on any number of ranks, and their shares differ by one row at most.
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

from rarec.errors import UserError

T = TypeVar("T")
CPU = torch.device("cpu")


class Place:
    """What a rank is at: a note, which its watch reads from a thread of its own.

    Attributes:
        now: how often steps began anew, the step, and calls in it: who has the least is behind; doing what; since when.
    """

    def __init__(self) -> None:
        self.now = ((0, 0, 0), "starting", time.monotonic())

    @property
    def doing(self) -> str:
        """What was noted last."""
        return self.now[1]

    def at(self, doing: str, step: int | None) -> None:
        """See `Ranks.at`."""
        (turn, last, calls), _, _ = self.now
        step = last if step is None else step
        place = (turn + (step < last), step, calls + 1 if step == last else 0)
        self.now = place, doing, time.monotonic()  # replaced as a whole


@dataclass(frozen=True)
class Ranks:
    """This process among its like.

    Attributes:
        index: from 0.
        count: how many there are.
        device: where tensors lie when they are exchanged.
        place: what this one is at.
    """

    index: int = 0
    count: int = 1
    device: torch.device = CPU
    place: Place = field(default_factory=Place, compare=False)

    @property
    def first(self) -> bool:
        """Whether it is this one that writes and speaks for all."""
        return self.index == 0

    def at(self, doing: str, step: int | None = None) -> None:
        """This rank now does that, in that step or in the same still. In each step all ranks say so equally often."""
        self.place.at(doing, step)

    def rows(self, total: int) -> Tensor:
        """Which of B rows are this rank's (b)."""
        return torch.arange(self.index, total, self.count, device=self.device)

    def in_step(self, jobs: Sequence[T]) -> Iterator[tuple[bool, T]]:
        """This rank's share of jobs that all know, marked True; one of another's, False, where others have one more.

        For a model that is sharded must be called as often on every rank.
        """
        for start in range(0, len(jobs), self.count):
            at = start + self.index
            self.at(self.place.doing)
            yield (True, jobs[at]) if at < len(jobs) else (False, jobs[start])

    def alike(self, jobs: Sequence[T]) -> Iterator[tuple[bool, T]]:
        """All of this rank's own jobs, marked True, and then as often the last one as others have more."""
        for at in range(self.most(len(jobs))):
            self.at(self.place.doing)
            yield (True, jobs[at]) if at < len(jobs) else (False, jobs[-1])

    def gathered(self, rows_b: Tensor, total: int) -> Tensor:
        """The rows of all ranks, in their order (B, ...). Gradients come back to the rank that a row is from.

        Args:
            rows_b: this rank's, (b, ...).
            total: B.
        """
        gathered: Tensor = rows_b if self.count == 1 else _Gathered.apply(rows_b, self, total)  # type: ignore[no-untyped-call]
        return gathered

    def every(self, part: Tensor) -> list[Tensor]:
        """The ranks' tensors, which are all of one shape; no gradient passes."""
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part)
        return parts

    def total(self, part: Tensor) -> Tensor:
        """The sum over all ranks; no gradient passes."""
        whole = part.detach().clone()
        if self.count > 1:
            dist.all_reduce(whole)
        return whole

    def merged(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array as all ranks made it together, in place: their sum.

        Exact, where one rank has made a value and the others have left a zero.
        """
        return self._reduced(array, dist.ReduceOp.SUM)

    def largest(self, array: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """The largest of the ranks' values at each place, in place."""
        return self._reduced(array, dist.ReduceOp.MAX)

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self.largest(np.array([number]))[0])

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every rank, in which no rank waits for another; where it fails on one, all end.

        Raises:
            Exception: on the first rank that failed, as it was.
            UserError: on the others: which rank that was, and what it said.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as met:
            if self.count == 1:
                raise
            error = met
        told = self._told(f"{error or type(error).__name__}" if error is not None else "")
        failed = next((index for index, text in enumerate(told) if text), None)
        if failed is None:
            return result  # type: ignore[return-value]
        if error is not None and failed == self.index:
            raise error
        raise UserError(f"rank {failed}: {told[failed]}", shared=True)

    def once(self, work: Callable[[], object]) -> None:
        """Do something on the first rank, such as writing; the others wait, and fail if it does."""
        self.together(lambda: work() if self.first else None)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.together(lambda: None)

    def _reduced(self, array: npt.NDArray[Any], by: dist.ReduceOp.RedOpType) -> npt.NDArray[Any]:
        for piece in np.array_split(array, 1 + (array.nbytes >> 28)) if self.count > 1 else ():
            reduced = torch.from_numpy(piece).to(self.device)
            dist.all_reduce(reduced, by)
            piece[...] = reduced.cpu().numpy()
        return array

    def _told(self, text: str) -> list[str]:
        """What each rank has to tell."""
        if self.count == 1:
            return [text]
        own = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        padded = torch.zeros(self.most(len(own)), dtype=torch.uint8, device=self.device)
        padded[: len(own)] = own.to(self.device)
        return [bytes(each.cpu().tolist()).rstrip(b"\0").decode() for each in self.every(padded)]


ALONE = Ranks()
"""A process without others."""


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_b: Tensor, ranks: Ranks, total: int) -> Tensor:
        ctx.ranks = ranks
        most = -(-total // ranks.count)  # shares differ by one row: the shorter ones are filled up
        filled_b = torch.cat([rows_b, rows_b.new_zeros(most - len(rows_b), *rows_b.shape[1:])])
        return torch.stack(ranks.every(filled_b.contiguous()), 1).flatten(0, 1)[:total]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ranks: Ranks = ctx.ranks
        return ranks.total(gradients[0])[ranks.index :: ranks.count], None, None
