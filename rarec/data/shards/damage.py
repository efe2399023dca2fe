"""Which samples of local shards are not what the index says, so that training can leave them out.

Shape letters: S samples.
"""

import os
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rarec.data.shards.cuts import Numbers
from rarec.data.shards.index import Entries, digest_of, key_of, tar_name
from rarec.data.shards.stream import LocalTars
from rarec.errors import UserError
from rarec.files import read_json

Named = dict[str, dict[str, int]]
"""Samples by the file that they are in and their key, with their number."""


def damaged_samples(index_S: Entries, tars: LocalTars, threads: int) -> Numbers:
    """The numbers of all damaged samples: each is read once, several shards at a time. A missing tar's all are.

    Raises:
        UserError: a tar may not be read.
    """
    shards = int(index_S["shard"][-1]) + 1

    def check(shard: int) -> list[int]:
        rows = range(*(bisect_left(index_S["shard"], edge) for edge in (shard, shard + 1)))
        if not os.path.lexists(tars.name(shard)):
            return list(rows)
        with tars.open(shard) as file:
            return [row for row in rows if not _whole(file, index_S[row])]

    with ThreadPoolExecutor(threads) as pool:
        return np.array([row for part in pool.map(check, range(shards)) for row in part], np.int64)


def name_samples(index_S: Entries, numbers: Numbers) -> Named:
    """Samples as people name them."""
    named: Named = {}
    for number in numbers.tolist():
        named.setdefault(tar_name(int(index_S[number]["shard"])), {})[key_of(index_S[number])] = number
    return named


def read_named(path: Path, index_S: Entries) -> Numbers:
    """The numbers in a file of `Named`.

    Raises:
        UserError: it is garbled, or names samples that the index has elsewhere.
    """
    named = read_json(path)
    try:
        numbers = np.array(sorted(number for keys in named.values() for number in keys.values()), np.int64)
        agrees = numbers.min(initial=0) >= 0 and name_samples(index_S, numbers) == named
    except (AttributeError, TypeError, ValueError, IndexError, OverflowError):
        agrees = False
    if not agrees:
        raise UserError(
            f"{path} names samples that these shards do not hold", "train it again: rarec train CONFIG --fresh"
        )
    return numbers


def _whole(file: BinaryIO, entry: np.void) -> bool:
    try:
        extent = os.pread(file.fileno(), int(entry["size"]), int(entry["offset"]))
    except (OSError, OverflowError):  # a bad sector; an offset beyond every file
        return False
    return bool(digest_of(extent) == entry["digest"])
