"""Filled prompts of a batch: which go together, and how they lie with their slots and padding.

Shape letters: B batch, T tokens, K slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rarec.prompts.hybrid import Encoded


@dataclass(frozen=True)
class LaidOut:
    """Prompts of a batch with their slots: ids and mask (B, T), slot positions (B, K)."""

    ids_BT: npt.NDArray[np.int64]
    mask_BT: npt.NDArray[np.int64]
    positions_BK: npt.NDArray[np.int64]


def by_length(prompts: Sequence[Encoded], size: int) -> list[npt.NDArray[np.int64]]:
    """Rows of these prompts, `size` at a time, those of like length together: little is padding."""
    order = np.argsort([len(prompt.tokens_T) for prompt in prompts], kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def lay_out(prompts: Sequence[Encoded], slots: Mapping[str, int], filler: int) -> LaidOut:
    """Insert slot positions into filled prompts and pad them on the right.

    Args:
        prompts: the batch (B).
        slots: how many slots each source gets, in the order in which the model supplies them; none makes text-only
            prompts.
        filler: a token id that stands at slots and padding. Neither is ever read as text.
    """
    wanted = {source: count for source, count in slots.items() if count}
    lengths = [len(prompt.tokens_T) + sum(wanted.values()) for prompt in prompts]
    ids_BT = np.full((len(prompts), max(lengths)), filler, np.int64)
    mask_BT = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    positions_BK = np.zeros((len(prompts), sum(wanted.values())), np.int64)
    for row, prompt in enumerate(prompts):
        groups, shift = {}, 0
        is_text = np.ones(lengths[row], bool)
        in_order = [source for source in prompt.marks if source in wanted]
        for source in sorted(in_order, key=lambda name: prompt.marks[name]):
            start = prompt.marks[source] + shift
            groups[source] = np.arange(start, start + wanted[source])
            is_text[groups[source]] = False
            shift += wanted[source]
        ids_BT[row, : lengths[row]][is_text] = prompt.tokens_T
        positions_BK[row] = np.concatenate([groups[source] for source in wanted]) if wanted else 0
    return LaidOut(ids_BT, mask_BT, positions_BK)
