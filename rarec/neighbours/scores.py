"""The score of an item by a neighbour table, in numpy alone: exported folders hold a copy of this file.

    score(i) = root of the sum over items j of the history of decay ** age(j) * table[j, i]

The newest item has age 0. The root, because the sums are so skewed that few of them would decide the weights of a
fusion. Shape letters: B histories, P items of all histories.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def newest_first(histories: Sequence[Any], newest: int, decay: float) -> tuple[Any, Any, Any]:
    """Return what a neighbour table is read by after some histories.

    Args:
        histories: item rows of each, oldest first.
        newest: number of items of a history that are read.
        decay: factor by each older item.

    Returns:
        The items of all histories, each newest first (P,), their weights (P,), and where each history begins and ends
        among them (B + 1,).
    """
    recent = [history[::-1][:newest] for history in histories]
    lengths = [len(items) for items in recent]
    ages = np.concatenate([np.arange(length) for length in lengths]) if recent else np.empty(0, np.int64)
    items = np.concatenate(recent).astype(np.int64) if len(ages) else ages
    return items, decay**ages, np.cumsum([0, *lengths])


def score(sums: Any, out: Any = None) -> Any:
    """Return scores from the decayed sums of a table's scores."""
    return np.sqrt(sums, out=out)


def factor_of_sums(weight: Any) -> Any:
    """Return the factor on a table's scores that multiplies an item's score by a weight."""
    return np.square(weight)
