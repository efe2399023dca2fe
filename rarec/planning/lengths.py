"""How long prompts will be, as the configuration bounds them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

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
