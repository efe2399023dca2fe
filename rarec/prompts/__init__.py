"""Hybrid prompts: templates of hard text and named soft slots -> token ids and slot positions. Needs no torch."""

from rarec.prompts.hybrid import AT_TITLES, Encoded, LaidOut, Marks, TextTokenizer, at_titles, by_length, lay_out
from rarec.prompts.pair import PromptPair, slot_names

__all__ = [
    "AT_TITLES",
    "Encoded",
    "LaidOut",
    "Marks",
    "PromptPair",
    "TextTokenizer",
    "at_titles",
    "by_length",
    "lay_out",
    "slot_names",
]
