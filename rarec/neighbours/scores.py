"""The score of an item by a neighbour table, and by each part of a fusion: exported folders hold a copy of this file.

    score(i) = root of the sum over items j of the history of decay ** age(j) * table[j, i]

The newest item has age 0. The root, because the sums are so skewed that few of them would decide the weights of a
fusion. Shape letters: B histories, P items of all histories, N catalogue, V vectors of a user, Z size of a part's
vectors, F size of those of all parts, side by side.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NEW = "new"
"""The part of a fusion that gives 1 to new items, which no training has met, and 0 to all others."""


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


def table_scores(table: tuple[Any, Any, Any], history: Any, newest: int, decay: float) -> Any:
    """Return the score of each item by a neighbour table after a history, (N,).

    Args:
        table: where the neighbours of each item begin and end (N + 1,), all neighbours, and their scores.
        history: item rows, oldest first.
        newest: see `newest_first`.
        decay: see `newest_first`.
    """
    starts, neighbours, values = table
    sums = np.zeros(len(starts) - 1, np.float32)
    items, weights, _ = newest_first([history], newest, decay)
    for item, weight in zip(items, weights.tolist(), strict=True):
        part = slice(starts[item], starts[item + 1])
        sums[neighbours[part]] += weight * values[part]
    return score(sums)


def part_scores(
    parts: Mapping[str, Any], tables: Mapping[str, Any], query_VF: Any, history: Any, newest: int, decay: float
) -> dict[str, Any]:
    """Return the scores of the catalogue by each part of a fusion alone, (N,) by name.

    Args:
        parts: by name, each with `vectors_NZ`, its item vectors, or None of a neighbour table.
        tables: the neighbour tables by name; see `table_scores`.
        query_VF: vectors of the user, those of the parts side by side; the best counts.
        history: item rows, oldest first.
        newest: see `newest_first`.
        decay: see `newest_first`.
    """
    scores = {}
    start = 0
    for name, part in parts.items():
        if part.vectors_NZ is None:
            scores[name] = table_scores(tables[name], history, newest, decay)
        else:
            end = start + part.vectors_NZ.shape[1]
            # not `@`: for one user, to wake BLAS's other threads takes several times as long as this
            scores[name] = np.einsum("nz,vz->nv", part.vectors_NZ, query_VF[:, start:end]).max(1)
            start = end
    return scores


def item_weights(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weight of each item's score by each part of a fusion, (N,) by name, or one for all.

    Args:
        parts: by name, each with `weight`, of known items, and `new_weight`, of new ones, which `vectors_NZ` of the
            part `new` marks.
    """
    if NEW not in parts:
        return {name: part.weight for name, part in parts.items()}
    new_N = parts[NEW].vectors_NZ[:, 0] > 0
    return {name: np.where(new_N, part.new_weight, part.weight) for name, part in parts.items()}


def shares(weights: Mapping[str, Any], scores: Mapping[str, Any]) -> Any:
    """Return what each part of a fusion adds to the score of each item, (N, P).

    Args:
        weights: see `item_weights`.
        scores: see `part_scores`.
    """
    return np.stack([np.asarray(weight, np.float32) * scores[name] for name, weight in weights.items()], 1)


def factor_of_sums(weight: Any) -> Any:
    """Return the factor on a table's scores that multiplies an item's score by a weight.

    It is never 0, so that the scores can be had back.
    """
    return np.square(np.maximum(weight, 1e-6))
