"""Scratch space for large arrays: in memory while they are small, else in a file that only this process sees."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Scratch:
    """How much memory one array may take, and where a larger one is kept.

    Attributes:
        bytes: size of the largest array in memory.
        directory: where larger ones are kept; made if need be. Without it, every array is in memory.
    """

    bytes: int = 0
    directory: Path | None = None

    def zeros(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array of zeros. Its file, if it has one, has no name and ends with the process.

        Raises:
            OSError: the disk has no room for it.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self.directory is None or size <= self.bytes:
            return np.zeros(shape, dtype)
        self.directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=self.directory) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # now: a mapped file on a full disk would kill the process
            return np.memmap(file, dtype, "r+", shape=tuple(shape)).view(np.ndarray)


IN_MEMORY = Scratch()
"""Keeps every array in memory."""
