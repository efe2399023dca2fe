"""Hybrid prompts: templates of hard text and named soft slots -> token ids and slot positions. Needs no torch."""

from rarec.prompts.hybrid import Encoded, LaidOut, by_length, lay_out
from rarec.prompts.pair import PromptPair
from rarec.prompts.tokens import TextTokenizer

__all__ = ["Encoded", "LaidOut", "PromptPair", "TextTokenizer", "by_length", "lay_out"]
