"""Hybrid prompts: templates of hard text and named soft slots -> token ids and slot positions. Needs no torch."""

from rarec.prompts.hybrid import AT_TITLES, Encoded, TextTokenizer, by_length, lay_out
from rarec.prompts.pair import PromptPair, slot_names

__all__ = ["AT_TITLES", "Encoded", "PromptPair", "TextTokenizer", "by_length", "lay_out", "slot_names"]
