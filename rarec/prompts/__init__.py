"""Hybrid prompt templates: hard text and named soft slots to token ids and slot positions. Knows no torch."""

from rarec.prompts.hybrid import Encoded
from rarec.prompts.layout import LaidOut, by_length, lay_out
from rarec.prompts.pair import PromptPair
from rarec.prompts.tokens import TextTokenizer

__all__ = ["Encoded", "LaidOut", "PromptPair", "TextTokenizer", "by_length", "lay_out"]
