"""The item table of an ID model while it trains: rows spread over the ranks, each with its part of Adam's state.

PyTorch's SparseAdam updates only the rows that a step has read, so a step costs the same for ten million items as for
ten thousand. (TorchRec, tried too, has no Adam for CPUs: docs/experiments.md.)

Shape letters: N items, M items of this rank, U items of a step, E dimension.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rarec.distributed.hardware import memory_of_rank
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ids.source import ITEMS_FILE, load_table

MOMENTS = {"exp_avg": "items_first.npy", "exp_avg_sq": "items_second.npy"}
"""Files of Adam's moments, by their names in PyTorch."""
FIRST_STD = 0.02
"""Standard deviation of the first vectors."""
BLOCK = 1 << 16
"""Rows that are drawn, or pass from rank to rank, at a time."""


class ItemTable:
    """A table (N, E), of which each rank holds a run of rows.

    Args:
        trained_N: marks items that occur in training. The vectors of all others are zero and no step changes them: a
            zero vector means that the item has none.
        dim: E.
        lr: learning rate.
        seed: of the first vectors, which do not depend on the number of ranks.
        world: all ranks.

    Raises:
        UserError: it does not fit into memory.

    Attributes:
        rows_ME: the rows of this rank.
        first: the first of them.
    """

    def __init__(self, trained_N: npt.NDArray[np.bool_], dim: int, lr: float, seed: int, world: World = SINGLE) -> None:
        self.world = world
        self.n_items = len(trained_N)
        _check_size(self.n_items, dim, world)
        share = -(-self.n_items // world.size)
        self.first = world.rank * share
        own = slice(self.first, min(self.first + share, self.n_items))
        rows_ME = _drawn(own, dim, seed).mul_(torch.from_numpy(trained_N[own])[:, None])
        self.rows_ME = nn.Parameter(rows_ME.to(world.device))
        self._untrained = torch.from_numpy(np.flatnonzero(~trained_N[own])).to(world.device)
        self._adam = torch.optim.SparseAdam([self.rows_ME], lr=lr)

    def start_from(self, file: Path) -> None:
        """Take the vectors of another training's items from its file; an item that it did not know keeps its own."""
        started_ME = self._own_rows(file).to(self.world.device)
        known_M = (started_ME != 0).any(1)
        self.rows_ME.data[known_M] = started_ME[known_M]

    @torch.no_grad()
    def look_up(self, rows_U: Tensor) -> Tensor:
        """Return the vectors of some items, (U, E), each from the rank that has it. All ranks ask for the same rows."""
        own_U = self._is_own(rows_U)
        vectors_UE = self.rows_ME.new_zeros(len(rows_U), self.rows_ME.shape[1])
        vectors_UE[own_U] = self.rows_ME[rows_U[own_U] - self.first]
        return self.world.all_reduce_sum(vectors_UE)

    def update(self, rows_U: Tensor, gradients_UE: Tensor) -> None:
        """Take a step of Adam on the rows that the step has read; the moments of all others stay as they are.

        Args:
            rows_U: sorted, each once.
            gradients_UE: of their vectors, summed over all ranks.
        """
        own_U = self._is_own(rows_U)
        places = (rows_U[own_U] - self.first)[None]
        self.rows_ME.grad = torch.sparse_coo_tensor(
            places, gradients_UE[own_U], self.rows_ME.shape, is_coalesced=True, check_invariants=False
        )
        self._adam.step()
        self.rows_ME.grad = None

    def _is_own(self, rows_U: Tensor) -> Tensor:
        """Return whether this rank has each of some rows, (U,)."""
        return (rows_U >= self.first) & (rows_U < self.first + len(self.rows_ME))

    def fill_untrained(self, value: Tensor | float) -> None:
        """Set the vectors of all items that do not occur in training."""
        self.rows_ME.data[self._untrained] = value

    def mean(self) -> Tensor:
        """Return the mean vector of the items that occur in training, (E,)."""
        sums = torch.cat([self.rows_ME.detach().sum(0), self.rows_ME.new_tensor([len(self.rows_ME)])])
        sums[-1] -= len(self._untrained)
        sums = self.world.all_reduce_sum(sums)
        return sums[:-1] / sums[-1]

    def save(self, directory: Path | None) -> None:
        """Write vectors and moments, rank 0 for all.

        Args:
            directory: to write to, on rank 0; None on the other ranks.
        """
        moments = self._adam.state[self.rows_ME]
        self._write(directory and directory / ITEMS_FILE, self.rows_ME.detach())
        for name, file in MOMENTS.items():
            self._write(directory and directory / file, moments[name])

    def load(self, directory: Path, step: int) -> None:
        """Read this rank's rows from files that any number of ranks may have written.

        Args:
            directory: that `save` has written to; its checkpoint is checked by hash, and belongs to this training.
            step: steps that Adam had taken.
        """
        self.rows_ME.data.copy_(self._own_rows(directory / ITEMS_FILE))
        moments = {name: self._own_rows(directory / file).to(self.world.device) for name, file in MOMENTS.items()}
        self._adam.state[self.rows_ME] = {"step": step, **moments}

    def _own_rows(self, file: Path) -> Tensor:
        """Return this rank's rows of a file."""
        return torch.from_numpy(load_table(file)[self.first : self.first + len(self.rows_ME)])

    def _write(self, file: Path | None, rows_ME: Tensor) -> None:
        """Write a table of which each rank has its rows; ranks without a file only send theirs."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.n_items, rows_ME.shape[1])}
        # not memory-mapped: on a full disk that would end the process without a word
        with (file or Path(os.devnull)).open("wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for block in self._blocks(rows_ME):
                out.write(block.cpu().numpy().astype("<f4", copy=False).tobytes())

    def _blocks(self, rows_ME: Tensor) -> Iterator[Tensor]:
        """Yield the rows of all ranks in order, a block at a time, on all ranks."""
        share = -(-self.n_items // self.world.size)
        for start in range(0, self.n_items, share):
            end = min(start + share, self.n_items)
            owner = start // share
            for low in range(start, end, BLOCK):
                high = min(low + BLOCK, end)
                block = rows_ME[low - self.first : high - self.first] if owner == self.world.rank else None
                yield self.world.broadcast(block, owner, (high - low, rows_ME.shape[1]))


def _check_size(n_items: int, dim: int, world: World) -> None:
    """Refuse a table of which a rank would have no rows, or more than its memory has room for.

    Raises:
        UserError: with the number of processes that would do.
    """
    fewer = next(ranks for ranks in range(world.size, 0, -1) if -(-n_items // ranks) * (ranks - 1) < n_items)
    if fewer < world.size:
        problem = f"{n_items} items, spread over {world.size} processes, leave some without any"
        raise UserError(problem, f"start {fewer} processes", shared=True)
    share = -(-n_items // world.size)
    need = 4 * share * dim * (1 + len(MOMENTS))
    has = memory_of_rank(world.device)
    if need > has:
        problem = f"the item table and Adam's state take {need / 1e9:.3g} GB on each of {world.size} processes"
        enough = f"{-(-need * world.size // has)} processes or more (launch/ids.py)"
        if world.device.type == "cpu":  # more of them on one machine would share its memory
            enough += f", {os.environ.get('LOCAL_WORLD_SIZE', '1')} on each machine"
        remedy = f"start {enough}, or lower the ID model's dim"
        raise UserError(f"{problem}, of which each has {has / 1e9:.3g}", remedy, shared=True)


def _drawn(own: slice, dim: int, seed: int) -> Tensor:
    """Draw the first vectors of some rows, each block of rows by its own generator."""
    rows_ME = np.empty((own.stop - own.start, dim), np.float32)
    for block in range(own.start // BLOCK, -(-own.stop // BLOCK)):
        begin = block * BLOCK
        low = max(own.start, begin)
        high = min(own.stop, begin + BLOCK)
        drawn = np.random.default_rng([seed, block]).standard_normal((BLOCK, dim), np.float32)
        rows_ME[low - own.start : high - own.start] = FIRST_STD * drawn[low - begin : high - begin]
    return torch.from_numpy(rows_ME)
