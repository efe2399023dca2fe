"""The score of an item by a neighbour table, and by each part of a fusion: exported folders hold a copy of this file.

    score(i) = root of the sum over items j of the history of decay ** age(j) * table[j, i]

The newest item has age 0. The root, because the sums are so skewed that few of them would decide the weights of a
fusion. Shape letters: B histories, P items of all histories, N catalogue, V vectors of a user, Z size of a part's
vectors, F size of those of all parts, side by side.
"""

from collections.abc import Mapping, Sequence
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


def known(lacking: Any) -> Any:
    """Return the items with whose mean those that a model lacks are compared: the ones that it knows, or else all."""
    return lacking if lacking.all() else ~lacking


def predicted(first: Any, lacking: Any, slope: float, lists: bool) -> Any:
    """Return what is added to the scores of a model for the items that it lacks, predicted from the first model's.

    It is the slope times what the first model has above its mean, or above 0 if it lists the few items that it scores.

    Args:
        first: scores of the first model, (..., N), of numpy or torch.
        lacking: marks the items, (N,).
        slope: of the model's scores over those of the first.
        lists: whether the first model lists items.
    """
    usual = 0.0 if lists else first[..., known(lacking)].mean(-1, keepdims=True)
    return slope * (first - usual) * lacking


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


def shares(parts: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return what each part of a fusion adds to the score of each item, (N,) by name.

    Args:
        parts: by name, each with `vectors_NZ`, `lacking_N` (marks of the items that it lacks, or None), `weight`,
            `slope`.
        scores: see `part_scores`; of the items that a part lacks, more is predicted.
    """
    first = next(iter(parts))
    added = {}
    for name, part in parts.items():
        added[name] = scores[name]
        if name != first and part.lacking_N is not None and part.lacking_N.any():
            lists = parts[first].vectors_NZ is None
            added[name] = scores[name] + predicted(scores[first], part.lacking_N, part.slope, lists)
        added[name] = part.weight * added[name]
    return added


def factor_of_sums(weight: Any) -> Any:
    """Return the factor on a table's scores that multiplies an item's score by a weight."""
    return np.square(weight)
