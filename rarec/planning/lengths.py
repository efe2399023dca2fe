"""How long prompts will be: as the shards of the run say, or as the configuration bounds them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rarec.config import RunConfig
from rarec.models.build import SIDES

SPECIAL = 2
"""Tokens that a tokenizer puts around a text, at most."""
_WORD = re.compile(r"\w+|[^\w\s]")
_FIELD = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Prompts:
    """Text tokens of a side's prompts, without slots.

    Attributes:
        longest: which memory must hold.
        mean: which time is spent on.
    """

    longest: int
    mean: float


@dataclass(frozen=True)
class Batches:
    """The batches of an epoch.

    Attributes:
        count: how many; None where that is not known.
        samples: of one, on average.
        smallest: samples of the smallest.
        largest: samples and longest user prompt of those that may take most memory: the one of most samples first, the
            one of the longest prompts last.
    """

    count: int | None
    samples: float
    smallest: int
    largest: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, batches: Iterable[npt.NDArray[np.integer]]) -> "Batches":
        """From the lengths of each one's user prompts."""
        shapes = [(len(tokens_b), int(tokens_b.max())) for tokens_b in batches]
        sizes = [size for size, _ in shapes]
        largest = max(shapes), max(shapes, key=lambda shape: shape[::-1])
        return cls(len(shapes), sum(sizes) / len(shapes), min(sizes), tuple(dict.fromkeys(largest)))


@dataclass(frozen=True)
class Samples:
    """What the selected samples are.

    Attributes:
        count: of an epoch.
        users: their prompts' lengths.
        batches: that they make under a token budget; None where batches are counted in samples.
    """

    count: int
    users: Prompts
    batches: Batches | None = None

    @classmethod
    def of(cls, tokens_S: npt.NDArray[np.integer], batches: Batches | None = None) -> "Samples":
        """From the lengths of their user prompts, as an index of shards has them."""
        return cls(len(tokens_S), Prompts(int(tokens_S.max()), float(tokens_S.mean())), batches)


def estimated(config: RunConfig, reserved: Mapping[str, int], context_length: int) -> dict[str, Prompts]:
    """Both sides' prompts as the configuration bounds them: every history full, every title and text as long as may be.

    A word or sign of the template counts as one token; a prompt is cut to `prompt.max_tokens` or the context length,
    slots included.

    Args:
        config: of the run.
        reserved: slots that are kept free on each side.
        context_length: of the language model.
    """
    most = min(config.prompt.max_tokens or context_length, context_length)
    asked = {"user": _user_text(config), "item": _item_text(config)}
    longest = {side: max(1, min(asked[side], most - reserved[side])) for side in SIDES}
    return {side: Prompts(longest[side], longest[side]) for side in SIDES}


def _user_text(config: RunConfig) -> int:
    prompt = config.prompt
    title = prompt.max_title_tokens + _words(prompt.separator)
    return SPECIAL + _words(prompt.user) + prompt.max_history * title * ("{history}" in prompt.user)


def _item_text(config: RunConfig) -> int:
    prompt = config.prompt
    has_text = "{title}" in prompt.item or "{text}" in prompt.item
    return SPECIAL + _words(prompt.item) + prompt.max_text_tokens * has_text


def _words(template: str) -> int:
    return len(_WORD.findall(_FIELD.sub(" ", template)))
