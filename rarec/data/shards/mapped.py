"""Memory-mapped arrays."""

import mmap

import numpy as np


def release(array: object) -> None:
    """Let go of the pages of a mapped array that were looked at; an array in memory stays as it is.

    They count as this process's memory, though the operating system holds them anyway, and gives them back at once.
    """
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap):
        array.madvise(mmap.MADV_DONTNEED)
